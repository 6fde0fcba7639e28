"""The factor of the loss in a backward pass in float16, whose gradients would vanish without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""DeepSpeed's names of what changes: the scale; the updates tried, and the last of them that overflowed, from which the
window is counted; and the overflows to go until the scale is halved, which only ZeRO counts."""


class LossScale:
    """The dynamic loss scale of one of DeepSpeed's optimizers for float16.

    It changes after the update and not, as DeepSpeed has it, before the gradients are divided by it: those of the step
    at which it grows would be half of what they are (decision 0020).
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._change = optimizer._update_scale
        optimizer._update_scale = lambda *overflow: None

    @property
    def _holder(self) -> Any:
        # A load puts another scaler in place.
        return getattr(self._optimizer, "loss_scale_config", None) or self._optimizer.loss_scaler

    @property
    def value(self) -> float:
        """What the loss of the next backward pass is multiplied by."""
        return float(self._holder.cur_scale)

    @property
    def least(self) -> float:
        """Below it the scale does not go."""
        holder = self._holder
        return float(holder.min_loss_scale if hasattr(holder, "min_loss_scale") else holder.min_scale)

    def update(self, overflow: bool) -> bool:
        """After an update, made or skipped. Returns whether it was skipped for a scale that is lower from now on."""
        if overflow and self.value <= self.least:
            # DeepSpeed would raise here; how many may be skipped in a row is for the run to say.
            self._holder.last_overflow_iter = self._holder.cur_iter
            self._holder.cur_iter += 1
            return False
        self._change(overflow)
        return overflow

    def load(self, saved: Mapping[str, Any]) -> None:
        """Goes on as `scale_state` found it, whatever the ZeRO stage that it was saved with."""
        for key, value in saved.items():
            if hasattr(self._holder, key):
                setattr(self._holder, key, value)


def scale_state(optimizer: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the loss scale was, from the state of one of DeepSpeed's optimizers; None where it was not dynamic."""
    held = getattr(optimizer["loss_scaler"], "__dict__", {}) if "loss_scaler" in optimizer else optimizer
    dynamic = held.get("dynamic", held.get("dynamic_loss_scale", False))
    return {key: held[key] for key in KEYS if key in held} if dynamic else None


def undo_first_update(optimizer: Any) -> None:
    """DeepSpeed's wrapper for half precision without ZeRO makes an update with gradients of zero when it is made, which
    decays the masters and counts as a step."""
    with torch.no_grad():
        for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                master.copy_(weight)
    for state in optimizer.optimizer.state.values():
        state["step"].zero_()
