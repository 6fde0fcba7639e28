"""`export CHECKPOINT DIR`: the checks, the folder, the gate."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pipeline.commands.flags import pop_flag, wants_help
from pipeline.errors import UserError
from pipeline.files.given_path import expanded
from pipeline.runtime.exit import log_line
from pipeline.spelling import did_you_mean, nearest_flag

USAGE = """\
usage: mnemos export CHECKPOINT DIR [--memory-only] [--no-tokenizer] [--raw-weights]
                     [--data.tokenizer NAME] [--model.backbone.pretrained FOLDER]

Writes the model of a checkpoint to the new folder DIR, for transformers: weights as safetensors, configuration,
tokenizer and a model card. CHECKPOINT is a checkpoint's folder, or a run directory for its newest one; any number of
ranks and any ZeRO stage may have saved it. The folder takes its name when a process of its own, which has transformers
and not this project, has computed the same logits with it.

  --memory-only                        the memory alone, beside the name and the hash of the frozen backbone that it was
                                       trained on; --model.memory.pretrained DIR attaches it
  --no-tokenizer                       the model alone
  --raw-weights                        those of the last update, not their moving average (--optimizer.ema-decay)
  --data.tokenizer NAME                where the run's tokenizer is now
  --model.backbone.pretrained FOLDER   where the frozen backbone is now"""
SWITCHES = ("--memory-only", "--no-tokenizer", "--raw-weights")
VALUED = ("--data.tokenizer", "--model.backbone.pretrained")


@dataclass(frozen=True)
class Request:
    """What the words of the command ask for."""

    source: Path
    out: Path
    memory_only: bool
    tokenizer: bool
    """Whether one is written."""
    raw: bool
    """Whether the weights are those of the last update, where there is a moving average of them."""
    values: Mapping[str, str | None]
    """Of `VALUED`."""


def parse(words: Sequence[str]) -> Request:
    """Reads the words of the command. Raises UserError."""
    rest = list(words)
    values: dict[str, str | None] = {}
    for flag in VALUED:
        values[flag], rest = pop_flag(rest, flag)
    places = [word for word in rest if word not in SWITCHES]
    unknown = next((word for word in places if word.startswith("-")), None)
    if unknown is not None:
        raise UserError(f"unknown flag {unknown}{did_you_mean(nearest_flag(unknown, (*SWITCHES, *VALUED)))}")
    empty = next((flag for flag, value in values.items() if value == ""), None)
    if empty is not None:
        raise UserError(f"{empty} needs a value")
    if len(places) != 2 or not all(places):
        raise UserError("export needs CHECKPOINT and the new folder DIR (see mnemos export --help)")
    source, out = map(expanded, places)
    return Request(
        source, out.absolute(), "--memory-only" in rest, "--no-tokenizer" not in rest, "--raw-weights" in rest, values
    )


def run_export(words: Sequence[str]) -> None:
    """The command. Raises UserError, with nothing left behind."""
    if wants_help(words):
        print(USAGE)
        return
    request, begun = parse(words), time.perf_counter()

    from pipeline.export.write import check_out, export_memory, export_model
    from pipeline.inference.trained import find, load_trained, read_run
    from pipeline.system import create_system

    checkpoint = find(request.source)
    check_out(request.out, checkpoint)
    tokenizer, pretrained = (request.values[flag] for flag in VALUED)
    config = read_run(checkpoint, tokenizer=tokenizer, pretrained=pretrained)
    system = create_system(config)
    write = export_memory if request.memory_only else export_model
    with ended_by_sigterm():
        found = write(
            lambda: load_trained(checkpoint, config, system, raw=request.raw),
            system,
            request.out,
            tokenizer=request.tokenizer,
            given=tokenizer,
        )
    print(f"{checkpoint} -> {request.out}: {found}, {time.perf_counter() - begun:.1f} s")


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """A SIGTERM ends what is inside as an exception does: folders and processes of its own go with it."""
    if threading.current_thread() is not threading.main_thread():
        # Python runs handlers in the main thread alone, and lets no other set them.
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        # Another one must not end the clearing up.
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except SystemExit as error:
        if error.code == 128 + signal.SIGTERM:
            log_line("stopped (SIGTERM); nothing was written")
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
