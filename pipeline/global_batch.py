"""`--global-batch-size` and `--global-batch-tokens`: micro-batches that follow from the ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from pipeline.config import RunConfig
from pipeline.errors import UserError


def in_global_batches(config: RunConfig, given: Collection[str], ranks: int | None) -> RunConfig:
    """The config with as many micro-batches as `global_batch_size` takes on so many ranks; None: as they are.

    `given`: the fields that a person chose. A `grad_accum` among them stands over a recipe's `global_batch_size`, and
    either over its `global_batch_tokens`, which is the number of sequences in tokens.
    Raises UserError where the sequences cannot be divided so.
    """
    if config.global_batch_tokens is not None:
        others = {"global_batch_size", "grad_accum"}.intersection(given)
        if others and "global_batch_tokens" not in given:
            config = dataclasses.replace(config, global_batch_tokens=None)
        else:
            config, given = _in_sequences(config, given), {*given, "global_batch_size"}
    if config.global_batch_size is None:
        return config
    if "grad_accum" in given and "global_batch_size" not in given:
        return dataclasses.replace(config, global_batch_size=None)
    if ranks is None or ranks % config.parallel.sequence:
        return config  # which the layout is refused for
    data = ranks // config.parallel.sequence
    rows = config.batch_size * data
    accumulation, rest = divmod(config.global_batch_size, rows)
    if rest:
        fix = _divisor(config.global_batch_size, config.batch_size, data)
        raise UserError(
            f"--global-batch-size {config.global_batch_size} is no multiple of --batch-size {config.batch_size} on"
            f" {data} data ranks: give {fix}"
        )
    if "grad_accum" in given and config.grad_accum != accumulation:
        raise UserError(
            f"--global-batch-size {config.global_batch_size} takes {accumulation} micro-batches of --batch-size"
            f" {config.batch_size} on {data} data ranks, and --grad-accum is {config.grad_accum}: leave one out"
        )
    return dataclasses.replace(config, grad_accum=accumulation)


def _in_sequences(config: RunConfig, given: Collection[str]) -> RunConfig:
    """The config with the sequences that `global_batch_tokens` are. Raises UserError where they are no whole number, or
    where a person gave another one."""
    tokens, length = config.global_batch_tokens, config.sequence_length
    assert tokens is not None
    rows, rest = divmod(tokens, length)
    if rest or not rows:
        raise UserError(
            f"--global-batch-tokens {tokens} is no multiple of --sequence-length {length}: give"
            f" {max(1, round(tokens / length)) * length}"
        )
    if "global_batch_size" in given and config.global_batch_size != rows:
        raise UserError(
            f"--global-batch-tokens {tokens} are {rows} sequences of --sequence-length {length}, and"
            f" --global-batch-size is {config.global_batch_size}: leave one out"
        )
    return dataclasses.replace(config, global_batch_size=rows)


def _divisor(whole: int, rows: int, data: int) -> str:
    """The flag that divides the sequences: the largest micro-batch below `rows`, or another global batch."""
    if whole % data:
        return f"--global-batch-size {max(1, round(whole / data)) * data}, a multiple of the ranks"
    return f"--batch-size {next(size for size in range(rows, 0, -1) if whole // data % size == 0)}"
