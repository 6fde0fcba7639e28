"""The commands. Imports nothing heavy until one is chosen."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.errors import RankError, UserError

if TYPE_CHECKING:
    from pipeline.config import RunConfig

LAST_WORDS = 3.0
"""Seconds that the other ranks leave rank 0 to say why a job ends."""

USAGE = """\
usage: mnemos COMMAND [arguments]        (or: python -m pipeline COMMAND)

Mnemos trains language models that remember.

  train RECIPE [--section.field value ...]   run a recipe; `train RECIPE --help` lists every flag
  recipes                                    every recipe, one line each
  plan RECIPE [flags]                        memory per device, tokens/s and hours, before anything is spent
  eval CHECKPOINT [flags]                    held-out perplexity by position, recall by distance, memory on and off
  bench throughput [flags]                   tokens/s, MFU and peak memory of training steps, as JSON and a table
  doctor                                     what this machine has: devices, kernels, attention backends, versions
  check RECIPE [flags]                       the checks that `train` makes before any rank starts

Every command takes --help. Ranks are started by the deepspeed launcher:
  ./launch.sh [launcher flags] RECIPE [flags]
  deepspeed --num_gpus 8 --module pipeline train RECIPE [flags]
  torchrun --nproc-per-node 8 -m pipeline train RECIPE [flags]
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 for an error that the user can mend."""
    words = without_local_rank(list(sys.argv[1:] if arguments is None else arguments))
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if words[0] in ("-V", "--version"):
        print(f"mnemos {__version__}")
        return 0
    command = COMMANDS.get(words[0])
    try:
        if command is None:
            raise UserError(f"unknown command {words[0]!r}: one of {', '.join(COMMANDS)}")
        if len(words) == 2 and words[1] in ("-h", "--help") and words[0] in HELP:
            print(HELP[words[0]])
            return 0
        command(words[1:])
        sys.stdout.flush()
        return 0
    except RankError as error:
        return _fail(str(error), everywhere=True)
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; nothing more must be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = f" ({error.filename})" if error.filename else ""
            rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
            return _fail(
                f"{rank}no space left on the device{where}: make room and start again; the run resumes where it was",
                everywhere=True,
            )
        raise


def _fail(message: str, everywhere: bool = False) -> int:
    # Errors of a whole job are the same on every rank: one line is enough.
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if everywhere or os.environ.get("RANK", "0") == "0":
        print(f"mnemos: {' '.join(message.split())}", file=sys.stderr, flush=True)
    elif ranks > 1:
        # The launcher kills every rank once one has ended: rank 0 must have said why by then.
        time.sleep(LAST_WORDS)
    if ranks > 1:
        # Ranks that stop in the middle of a step hold collectives whose threads would abort an ordinary exit.
        sys.stdout.flush()
        os._exit(2)
    return 2


def without_local_rank(words: list[str]) -> list[str]:
    """Drops the `--local_rank N` that launchers insert; the environment says the same."""
    kept = []
    skip = False
    for word in words:
        if skip:
            skip = False
            continue
        if word in ("--local_rank", "--local-rank"):
            skip = True
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            kept.append(word)
    return kept


def parse_run(words: Sequence[str], command: str) -> RunConfig:
    """The config that `RECIPE [--config FILE] [flags]` means. Raises UserError; exits for --help."""
    from pathlib import Path

    from pipeline.archive import load_config
    from pipeline.recipes import all_recipes

    recipes = all_recipes()
    rest = list(words)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else None
    file, rest = _take(rest, "--config")
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


def _take(words: list[str], flag: str) -> tuple[str | None, list[str]]:
    for index, word in enumerate(words):
        if word == flag:
            if index + 1 == len(words):
                raise UserError(f"{flag} needs a value")
            return words[index + 1], words[:index] + words[index + 2 :]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2], words[:index] + words[index + 1 :]
    return None, words


def fit_ranks(config: RunConfig, words: Sequence[str], ranks: int) -> RunConfig:
    """The recipe's sequence degree made to fit the ranks; a degree that the user gave is left alone, to be refused."""
    import math

    if any(word.partition("=")[0] in ("--parallel.sequence", "--config") for word in words):
        return config
    degree = math.gcd(config.parallel.sequence, ranks)
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, sequence=degree))


def _train(words: Sequence[str]) -> None:
    config = fit_ranks(parse_run(words, "train"), words, int(os.environ.get("WORLD_SIZE", "1")))
    from pipeline.engine import stop
    from pipeline.train import train

    try:
        train(config)
    finally:
        stop()


def _check(words: Sequence[str]) -> None:
    ranks, rest = _take(list(words), "--launch-ranks")
    for flag in ("--launch-nodes", "--launch-gpus-per-node"):
        _, rest = _take(rest, flag)
    world = int(ranks) if ranks is not None and ranks.isdigit() else 1 if ranks is None else 0
    if world < 1:
        raise UserError(f"--launch-ranks is {ranks}: give a number of ranks above 0")
    config = fit_ranks(parse_run(rest, "check"), rest, world)
    from pipeline.preflight import preflight

    preflight(config, ranks=world)


def _recipes(words: Sequence[str]) -> None:
    from pipeline.recipes import all_recipes, describe

    if words:
        raise UserError(f"recipes takes no arguments, got {words[0]!r}")
    found = all_recipes()
    width = max(map(len, found))
    for name in sorted(found):
        print(f"{name:<{width}}  {describe(found[name])}")


def _plan(words: Sequence[str]) -> None:
    from pipeline.plan import run_plan

    run_plan(words)


def _eval(words: Sequence[str]) -> None:
    from pipeline.evals.command import run_eval

    run_eval(words)


def _bench(words: Sequence[str]) -> None:
    from pipeline.bench import run_bench

    run_bench(words)


def _doctor(words: Sequence[str]) -> None:
    from pipeline.doctor import collect, render

    if words:
        raise UserError(f"doctor takes no arguments, got {words[0]!r}")
    print(render(collect()))


HELP = {
    "recipes": "usage: mnemos recipes\n\nEvery recipe, one line each.",
    "doctor": "usage: mnemos doctor\n\nWhat this machine has: devices, kernels, attention backends, versions.",
    "eval": (
        "usage: mnemos eval CHECKPOINT [flags of its recipe]\n\nCHECKPOINT is a checkpoint's folder, or a run directory"
        " for its latest one.\nThe result goes to OUT/evals."
    ),
    "bench": "usage: mnemos bench throughput [--lengths N ...] [--ranks N] [RECIPE] [flags]",
    "plan": (
        "usage: mnemos plan RECIPE [--ranks N] [--device NAME] [--utilisation SHARE] [flags of the recipe]\n\n"
        "  --ranks N            devices in all (default 1)\n"
        "  --device NAME        a device with a known peak (default H200)\n"
        "  --utilisation SHARE  share of the peak that model FLOPs are expected to reach (default 0.4)"
    ),
}
"""Help of the commands whose flags are not a recipe's alone."""

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "recipes": _recipes,
    "plan": _plan,
    "eval": _eval,
    "bench": _bench,
    "doctor": _doctor,
    "check": _check,
}
