"""How long training takes, in steps, tokens or epochs: `--max-duration` and `--epochs` beside `--steps`, and what OLMo
writes for them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from pipeline.config import IN_EPOCHS, RunConfig, replace
from pipeline.errors import UserError, shown
from pipeline.units import LARGEST

FLAG = "--max-duration"
MORE = {"steps": "max_duration"}
"""What gives a field beside its own flag."""


def number(value: Any, what: str) -> float:
    """A finite number of a YAML file, to which 1e-6 is text. Raises UserError, which begins with `what`."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{what} is {shown(value)}: give a number")
    return found


def whole(value: Any, what: str, least: int = 0) -> int:
    """A whole number from `least` on. Raises UserError, which begins with `what`."""
    found = value if type(value) is int else number(value, what)
    if found != int(found) or found < least:
        raise UserError(f"{what} is {shown(value)}: give a whole number, {least} or more")
    return int(found)


def steps_of(value: Any, what: str, tokens_per_step: int, *, in_tokens: bool = False) -> int:
    """Steps that a duration has: a number of them, or of tokens as 4e12T; a part of a step counts as one.

    `in_tokens`: a number without a unit is one of tokens. Raises UserError, which begins with `what`.
    """
    text = str(value).replace("_", "")
    if text.endswith("ep"):
        raise UserError(f"{what} is {shown(value)}: give it in steps, or in tokens as 4e12T")
    if text.endswith("T"):
        text, in_tokens = text[:-1], True
    found = whole(text, what)
    return -(-found // tokens_per_step) if in_tokens else found


def with_duration(
    config: RunConfig, duration: str | None, given: Collection[str], ranks: int | None, *, own_stop: bool
) -> RunConfig:
    """The config of a command line with the value of its `--max-duration`, where training stops; None: without one.

    It is also the length of the schedule, unless that has one of its own: `--steps` is among the flags `given`, or the
    recipe or file stops before its schedule ends (`own_stop`). `--steps` alone trains that many, without their stop.
    Raises UserError.
    """
    if duration is None:
        lets_go = own_stop and "steps" in given and "stop_after" not in given
        return dataclasses.replace(config, stop_after=None) if lets_go else config
    data_ranks = max(1, (ranks or 1) // config.parallel.sequence)
    rows = config.global_batch_size or config.batch_size * config.grad_accum * data_ranks
    steps = steps_of(duration, FLAG, rows * config.sequence_length)
    if steps < 1:
        raise UserError(f"{FLAG} is {shown(duration)}: give 1 or more")
    if not own_stop and "steps" not in given:
        return dataclasses.replace(config, steps=steps)
    if "stop_after" in given:
        raise UserError(f"{FLAG} and --stop-after are both given, and each is where training stops: keep one")
    if steps > config.steps:
        raise UserError(
            f"{FLAG} is {shown(duration)}, {steps} steps, and the schedule ends at {config.steps}: give --steps {steps}"
            " for a longer schedule"
        )
    return dataclasses.replace(config, stop_after=steps)


def by_one_measure(config: RunConfig, given: Collection[str], in_file: Collection[str]) -> RunConfig:
    """The config in which what a person says in steps stands over epochs that were there before: those of the recipe,
    or of the `--config` file.

    `given`: fields whose flags are among the words, and `max_duration` where it is; `in_file`: fields that the file
    gives. Raises UserError where both flags of a length are there.
    """
    for name, field in IN_EPOCHS.items():
        in_steps = next((other for other in (field, MORE.get(field, field)) if other in given), None)
        flag = "--epochs" if name == "train" else f"--epochs.{name}"
        if f"epochs.{name}" in given:
            if in_steps is not None and getattr(config.epochs, name):
                other = f"--{in_steps.replace('_', '-')}"
                raise UserError(f"{flag} and {other} are both given, and each says the same length: keep one")
        elif in_steps is not None or (field in in_file and f"epochs.{name}" not in in_file):
            config = replace(config, **{f"epochs__{name}": 0.0})
    return config


def in_epochs(config: RunConfig, steps_per_epoch: float) -> RunConfig:
    """The config with the steps that its lengths in epochs are, where an epoch has `steps_per_epoch` of them.

    A part of a step counts as one in the length of the schedule; intervals are rounded, and are one step at least. The
    lengths in epochs stay as they are. Raises UserError for more steps than a run can have.
    """
    found: dict[str, int] = {}
    for name, field in IN_EPOCHS.items():
        epochs = getattr(config.epochs, name)
        if not epochs:
            continue
        # The product of 0.1 and 30 is not to have a part of a fourth step.
        steps = round(epochs * steps_per_epoch, 6)
        if steps > LARGEST:
            raise UserError(f"--epochs.{name} is {epochs:g}, {steps:.3g} steps: give fewer")
        found[field] = max(1, math.ceil(steps) if field == "steps" else round(steps))
    return dataclasses.replace(config, **found)  # type: ignore[arg-type]
