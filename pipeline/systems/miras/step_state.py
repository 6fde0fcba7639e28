"""What a memory keeps from token to token while decoding."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StepState(NamedTuple):
    """What the memories of one layer keep between tokens; None is what the rule has no need of. Float32, or float64 of
    a model in float64."""

    memory: Tensor
    """M [rows, heads, state rows, dim]."""
    momentum: Tensor
    """S, like memory."""
    place: Tensor | None = None
    """[rows] int64 on the CPU: tokens of the present chunk so far, 0 at a border."""
    start: Tensor | None = None
    """Like memory: what the chunk's gradients are taken at (a matrix behind its link; whole weights of a deep memory).
    Of no meaning at a border."""
    gathered: Tensor | None = None
    """Like memory: the sum of the chunk's gradients, of a rule that writes at the chunk's end (swiglu); 0 at a
    border."""
    gates: Tensor | None = None
    """[rows, heads, 2] of such a rule: the sum of the chunk's eta and the product of its 1 - alpha; (0, 1) at a
    border."""

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name; `StepState(**tensors)` is the inverse."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}
