"""The dtype that a run computes in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.config import RunConfig
from pipeline.host.hardware import has_amx, has_bf16, on_gpu


def precision_of(config: RunConfig) -> torch.dtype:
    """The dtype that the model computes in; master weights and optimizer state are float32 in any case."""
    if config.precision not in ("auto", "auto-amx"):
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    if on_gpu():
        return torch.bfloat16 if has_bf16() else torch.float16
    return torch.bfloat16 if config.precision == "auto-amx" and has_amx() else torch.float32


def precision_here(config: RunConfig) -> tuple[str, str]:
    """The precision of this rank, and its device."""
    return str(precision_of(config)).removeprefix("torch."), torch.cuda.get_device_name() if on_gpu() else "a CPU"


def different_precision(flag: str, ranks: Sequence[tuple[str, str]]) -> str | None:
    """What is wrong where a rank chose another precision than rank 0, each for its device; None where all agree.

    `flag`: the value of --precision. `ranks`: `precision_here` of each.
    """
    first, device = ranks[0]
    for rank, (precision, other) in enumerate(ranks):
        if precision != first:
            return (
                f"--precision {flag}: rank {rank} on {other} computes in {precision}, and rank 0 on {device} in"
                f" {first}: give a precision that all devices have"
            )
    return None
