"""`checkpoint verify`, `checkpoint list` and `checkpoint convert`: no process group, no GPU, no model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoint.manifest import (
    BEST,
    LATEST,
    POINTERS,
    newest,
    problems,
    read_manifest,
    unlisted,
)
from pipeline.commands.convert import (
    CONVERT,
    FORMAT_FLAGS,
    TOKENIZER,
    check_format,
    from_native,
    to_native,
    to_universal,
)
from pipeline.commands.flags import pop_flag, wants_help
from pipeline.commands.found import facts, find, notes, stale_pointers
from pipeline.errors import UserError
from pipeline.host.hardware import choose_accelerator
from pipeline.spelling import did_you_mean, nearest, nearest_flag
from pipeline.units import human_bytes

USAGE = """\
usage: mnemos checkpoint verify PATH ... [--quick]
       mnemos checkpoint list PATH [--json]
       mnemos checkpoint convert CHECKPOINT DIR [--to olmo [--tokenizer NAME]]
       mnemos checkpoint convert FOLDER DIR --from olmo

A PATH is a checkpoint's folder, or a run directory for all of its checkpoints. Each command takes --help."""

VERIFY = """\
usage: mnemos checkpoint verify PATH ... [--quick]

Reads every byte of checkpoints and compares it with their manifests. A PATH is a checkpoint's folder, or a run
directory for all of its checkpoints. The exit code is 0 when all are whole, else 2.

  --quick  compare sizes alone, as a resume does when it chooses a checkpoint"""

LIST = """\
usage: mnemos checkpoint list PATH [--json]

The checkpoints of a run directory, or the one in a folder: step, time, size, ranks, ZeRO stage, format, and whether
`latest` or `best` names it.

  --json  as JSON"""

Flags = Mapping[str, str | None]
"""The flags that are given, with the values of those that have one."""


def run_checkpoint(words: Sequence[str]) -> None:
    """The command: `checkpoint verify`, `checkpoint list` or `checkpoint convert`. Raises UserError."""
    if words and wants_help(words[:1]):
        print(USAGE)
        return
    if not words or words[0] not in _COMMANDS:
        given = f"{words[0]!r}{did_you_mean(nearest(words[0], _COMMANDS))}" if words else "none"
        raise UserError(f"checkpoint needs one of {', '.join(_COMMANDS)} (got {given})")
    command, help_text, flags, valued = _COMMANDS[words[0]]
    rest = list(words[1:])
    if wants_help(rest):
        print(help_text)
        return
    values: dict[str, str | None] = {}
    for flag in valued:
        value, rest = pop_flag(rest, flag)
        if value is not None:
            values[flag] = value
    given_flags = [word for word in rest if word.startswith("-")]
    unknown = [word for word in given_flags if word not in flags]
    if unknown:
        meant = did_you_mean(nearest_flag(unknown[0], [*flags, *valued]))
        raise UserError(f"checkpoint {words[0]} has no {unknown[0]}{meant} (see mnemos checkpoint {words[0]} --help)")
    command([word for word in rest if not word.startswith("-")], {**dict.fromkeys(given_flags), **values})


def _verify(words: Sequence[str], flags: Flags) -> None:
    if not words:
        raise UserError(
            "checkpoint verify needs the folder of a checkpoint or run (see mnemos checkpoint verify --help)"
        )
    places = [find(Path(word)) for word in words]
    count = sum(len(place.checkpoints) for place in places)
    wrong: list[str] = []
    damaged = 0
    print(_line("checkpoint", "step", "size", "ranks", "ZeRO", "format", "state"))
    for place in places:
        for checkpoint in place.checkpoints:
            row = facts(checkpoint)
            found = check(checkpoint, hashes="--quick" not in flags)
            if found and not checkpoint.is_dir():
                # A run that goes on removes what lies beyond --keep.
                found, state = [], "removed meanwhile"
            else:
                state = "OK" if not found else found[0]
            print(_line(*_cells(row), state), flush=True)
            for problem in found[1:]:
                print(_line("", "", "", "", "", "", problem))
            wrong += found
            damaged += bool(found)
        for stale in stale_pointers(place):
            print(stale)
            wrong.append(stale)
        for note in notes(place.folder):
            print(note)
    if not count:
        raise UserError(f"{words[0]}: no complete checkpoint there: only saves that did not finish")
    if damaged:
        raise UserError(
            f"{damaged} of {count} checkpoints {'is' if damaged == 1 else 'are'} not whole ({wrong[0]}):"
            " restore the file from a copy, or resume from another checkpoint"
        )
    if wrong:
        raise UserError(wrong[0])


def check(checkpoint: Path, *, hashes: bool) -> list[str]:
    """As `problems`, with files that the manifest does not list, and files that cannot be read."""
    try:
        found = problems(checkpoint, hashes=hashes)
        manifest = None if found else read_manifest(checkpoint)
    except OSError as error:
        return [f"{error.filename or checkpoint}: {error.strerror or error}"]
    if manifest is not None:
        found = [f"{checkpoint / path}: not in the manifest" for path in unlisted(checkpoint, manifest)]
    return found


def _list(words: Sequence[str], flags: Flags) -> None:
    if len(words) != 1:
        raise UserError(f"checkpoint list takes one run directory or checkpoint, got {len(words)}")
    place = find(Path(words[0]))
    latest, best = place.named(LATEST), place.named(BEST)
    rows = [{**facts(path), "latest": path.name == latest, "best": path.name == best} for path in place.checkpoints]
    if "--json" in flags:
        whole = {"folder": str(place.folder or words[0]), "latest": latest, "best": best, "checkpoints": rows}
        print(json.dumps(whole, indent=2))
        return
    print(_line("checkpoint", "step", "size", "ranks", "ZeRO", "format", "written"))
    for row in rows:
        when = (
            "" if not row.get("written") else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["written"] / 1e9))
        )
        end = row["problem"] or f"{when:<19}"
        print(_line(*_cells(row), "  ".join([end, *(name for name in POINTERS if row[name])])))
    for note in [*stale_pointers(place), *notes(place.folder)]:
        print(note)


def _cells(row: dict[str, Any]) -> list[str]:
    if row["problem"] is not None:
        return [row["name"], "-", "-", "-", "-", "-"]
    ranks = f"{row['world']} (data {row['data']} x sequence {row['sequence']})"
    return [row["name"], str(row["step"]), human_bytes(row["bytes"]), ranks, str(row["zero_stage"]), str(row["format"])]


def _line(*cells: str) -> str:
    name, step, size, ranks, stage, kind, end = cells
    return f"{name:<18} {step:>8} {size:>10}  {ranks:<26} {stage:>4}  {kind:<9}  {end}".rstrip()


def _convert(words: Sequence[str], flags: Flags) -> None:
    if len(words) != 2:
        raise UserError(
            "checkpoint convert needs CHECKPOINT and the new folder DIR (see mnemos checkpoint convert --help)"
        )
    choose_accelerator()
    source, out = Path(words[0]), Path(words[1])
    other = check_format(flags)
    if other == "--from":
        from_native(source, out)
        return
    place = find(source)
    checkpoint: Path | None = source
    if place.folder is not None:
        checkpoint = newest(place.folder)
        if checkpoint is None:
            raise UserError(f"{source}: no complete checkpoint there: only saves that did not finish")
    assert checkpoint is not None
    if other == "--to":
        to_native(checkpoint, out, flags.get(TOKENIZER))
    else:
        to_universal(checkpoint, out)


_COMMANDS: dict[str, tuple[Callable[[Sequence[str], Flags], None], str, tuple[str, ...], tuple[str, ...]]] = {
    "verify": (_verify, VERIFY, ("--quick",), ()),
    "list": (_list, LIST, ("--json",), ()),
    "convert": (_convert, CONVERT, (), FORMAT_FLAGS),
}
"""What each does, its help, its flags without and with a value."""
