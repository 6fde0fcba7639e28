"""How long training takes, in steps or tokens: `--max-duration` beside `--steps`, and OLMo's form of both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import UserError, shown

FLAG = "--max-duration"


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
