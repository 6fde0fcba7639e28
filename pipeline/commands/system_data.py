"""What systems add to `mnemos data`: sets that they make, and checks of files that they alone read."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.flags import parse_flags
from pipeline.data.tokens.listing import SUFFIXES
from pipeline.errors import UserError
from pipeline.files.given_path import expanded
from pipeline.spelling import did_you_mean, nearest

if TYPE_CHECKING:
    from pipeline.data_commands import DataCommands

_SYSTEMS = "pipeline.systems"


def _systems() -> Iterator[tuple[str, DataCommands]]:
    for found in pkgutil.iter_modules(importlib.import_module(_SYSTEMS).__path__):
        commands = getattr(importlib.import_module(f"{_SYSTEMS}.{found.name}"), "data_commands", None)
        if commands is not None:
            yield found.name, commands()


def run_synth(words: Sequence[str]) -> None:
    """`data synth SYSTEM --out FILE --count N [flags]`. Raises UserError."""
    known = dict(_systems())
    if not words or words[0] not in known:
        given = f"{words[0]!r}{did_you_mean(nearest(words[0], known))}" if words else "none"
        raise UserError(f"data synth needs a system that makes sets: one of {', '.join(known)} (got {given})")
    commands = known[words[0]]
    commands.synth(parse_flags(commands.synth_options, words[1:], f"mnemos data synth {words[0]}"))


def _suffixes() -> list[Sequence[str]]:
    """Of the files that each system alone reads."""
    return [commands.suffixes for _, commands in _systems()]


def _kinds(place: str) -> set[str]:
    """The suffix of a file; of a folder those of its files that a system alone reads, where it holds no token files."""
    path = expanded(place)
    if not path.is_dir():
        return {path.suffix.lower()}
    held = {file.suffix.lower() for file in path.iterdir()}
    known = held & {suffix for kinds in _suffixes() for suffix in kinds}
    return known if known and not any(file.suffix in SUFFIXES for file in path.rglob("*")) else {""}


def verified(words: Sequence[str]) -> bool:
    """Checks the files or folders of `data verify FILE ... [flags]` where they are of a kind that a system alone reads;
    whether they are. Raises UserError when a check fails."""
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    suffixes = set().union(*map(_kinds, words[:first]))
    if not suffixes and any(Path(word).suffix.lower() in kinds for word in words for kinds in _suffixes()):
        raise UserError("data verify takes its files before its flags: data verify FILE ... [flags]")
    if suffixes <= {"", *SUFFIXES}:
        return False
    for _, commands in _systems():
        if suffixes <= set(commands.suffixes):
            options = parse_flags(commands.verify_options, words[first:], "mnemos data verify FILE ...")
            commands.verify(words[:first], options)
            return True
    return False
