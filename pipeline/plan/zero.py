"""What ZeRO holds on a device: weights, gradients, optimizer state, and the buffers that DeepSpeed makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.ds_config import offload_device
from pipeline.system import Phase

DEFAULTS = {
    "contiguous_gradients": True,
    "reduce_bucket_size": 500_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
}
"""Those of DeepSpeed 0.19.8 for what a configuration leaves out or to "auto", in elements."""


@dataclass(frozen=True)
class PhaseCounts:
    """A phase, and the elements of the parameters that it trains."""

    phase: Phase
    trainable: int


@dataclass(frozen=True)
class Counts:
    """Elements of a model's parameters."""

    parameters: int
    trainable: int
    """In any phase."""
    largest: int
    """Of the largest single parameter."""
    phases: tuple[PhaseCounts, ...] = ()
    """Of each phase of the run."""

    @property
    def most_trained(self) -> int:
        """In the phase that trains most, which needs the most memory."""
        return max((phase.trainable for phase in self.phases), default=self.trainable)


def zero_bytes(
    ds_config: Mapping[str, Any], counts: Counts, *, ranks: int, element: int, averaged: bool = False
) -> dict[str, int]:
    """Bytes per device, by what they are; `element` is the size of a weight that the model computes with, `averaged`
    whether a moving average of the weights is kept.

    Buffers: stages 1 and 2 reduce gradients through one bucket, or two that take turns (overlap_comm). Stage 3 has one,
    and holds gathered weights: as many as `stage3_max_live_parameters`, and the parameter in use.
    """
    zero = ds_config.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))

    def held(count: float, since: int, offload: str) -> int:
        if offload_device(ds_config, offload) != "none":
            return 0
        return int(count / ranks if stage >= since else count)

    def setting(name: str) -> int:
        value = zero.get(name, "auto")
        return int(DEFAULTS[name] if value == "auto" else value)

    bucket = element * setting("reduce_bucket_size") if stage and setting("contiguous_gradients") else 0
    gathered = 0
    if stage == 3:
        gathered = element * min(counts.parameters, setting("stage3_max_live_parameters") + counts.largest)
    elif zero.get("overlap_comm"):
        bucket *= 2
    return {
        "weights": held(element * counts.parameters, 3, "offload_param"),
        "gradients": held(4 * counts.most_trained, 2, "offload_optimizer"),
        # float32 master weights and two moments.
        "optimizer": held(12 * counts.most_trained, 1, "offload_optimizer"),
        # Of the master weights, and as they are.
        **({"average": held(4 * counts.most_trained, 1, "offload_optimizer")} if averaged else {}),
        "ZeRO's buffers": bucket + gathered,
    }
