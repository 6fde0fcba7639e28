"""From the words of a command line to a config. Imports nothing heavy until a config is asked for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import RunConfig


def parse_run(words: Sequence[str], command: str) -> RunConfig:
    """The config that `RECIPE [--config FILE] [flags]` means. Raises UserError; exits for --help."""
    from pathlib import Path

    from pipeline.archive import load_config
    from pipeline.recipes import all_recipes

    recipes = all_recipes()
    rest = list(words)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else None
    file, rest = take(rest, "--config")
    if file is not None:
        config = load_config(Path(file), recipes)
        if name is not None and name != config.recipe:
            raise UserError(f"--config {file} is a run of {config.recipe}, not of {name}: name one of them")
        name = config.recipe
    elif name is None:
        if {"-h", "--help"} & set(rest):
            print(f"usage: mnemos {command} RECIPE [--config FILE] [flags]\n\nrecipes: {', '.join(sorted(recipes))}")
            raise SystemExit(0)
        raise UserError(f"{command} needs a recipe: one of {', '.join(sorted(recipes))}")
    elif name not in recipes:
        raise UserError(f"unknown recipe {name!r}: one of {', '.join(sorted(recipes))}")
    else:
        config = recipes[name]()
    given = {word.partition("=")[0] for word in rest}
    if "--data.path" in given and "--data.dataset" not in given:
        # What a person names replaces the recipe's own source.
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dataset=None))
    elif "--data.dataset" in given and "--data.path" not in given:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=()))
    return parse_flags(config, rest, f"mnemos {command} {name}")


def parse_flags(default: Any, words: Sequence[str], program: str) -> Any:
    """A dataclass with flags over it. Raises UserError in one line instead of tyro's box; exits for --help."""
    import contextlib
    import io

    import tyro

    if {"-h", "--help"} & set(words):
        return tyro.cli(type(default), default=default, args=words, prog=program, config=(tyro.conf.AvoidSubcommands,))
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured), contextlib.redirect_stdout(captured):
            return tyro.cli(
                type(default), default=default, args=words, prog=program, config=(tyro.conf.AvoidSubcommands,)
            )
    except SystemExit as error:
        if error.code in (0, None):
            raise
        raise UserError(f"{_message(captured.getvalue())} (see {program} --help)") from None


def _message(box: str) -> str:
    """What tyro's box says, in one line: its first paragraph, and the flags that may have been meant."""
    paragraphs = [""]
    for line in box.splitlines():
        text = line.strip("╭╮╰╯│─- \t") if not line.strip(" │").startswith("--") else line.strip(" │")
        if line.startswith("╭") or not text.strip("─-"):
            paragraphs.append("")
        else:
            paragraphs[-1] = f"{paragraphs[-1]} {text}".strip()
    # A terminal's box has its title in the border; a plain one has it as a paragraph of its own.
    found = [text for text in paragraphs if text]
    message = found[min(1, len(found) - 1)] if not box.startswith("╭") else found[0]
    meant = next((text for text in found if text.startswith("Perhaps you meant")), "")
    flags = list(dict.fromkeys(re.findall(r"--[a-z][\w.-]*", meant)))
    hint = f"; perhaps {', '.join(flags[:3])}" if flags else ""
    return message.rstrip(".") + hint


def take(words: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of a flag, None where it is absent, and the words without it."""
    for index, word in enumerate(words):
        if word == flag:
            if index + 1 == len(words):
                raise UserError(f"{flag} needs a value")
            return words[index + 1], words[:index] + words[index + 2 :]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2], words[:index] + words[index + 1 :]
    return None, words


def fit_ranks(config: RunConfig, words: Sequence[str], ranks: int) -> RunConfig:
    """The recipe's sequence degree made to fit the ranks; one that a flag or a --config file gives is left alone, to be
    refused."""
    import math
    from pathlib import Path

    from pipeline.archive import states

    file, _ = take(list(words), "--config")
    stated = file is not None and states(Path(file), "parallel", "sequence")
    if stated or any(word.partition("=")[0] == "--parallel.sequence" for word in words):
        return config
    degree = math.gcd(config.parallel.sequence, ranks)
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, sequence=degree))


def split_flags(words: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of the flags in `names` (with their values), and the others."""
    own: list[str] = []
    rest: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        if word.lstrip("-").partition("=")[0] in names and word.startswith("--"):
            own.append(word)
            if "=" not in word and pending:
                own.append(pending.pop(0))
        else:
            rest.append(word)
    return own, rest
