"""Rotary position embedding (RoPE, arXiv 2104.09864), in the "rotate half" layout of Hugging Face Llama and OLMo2.

Attention here receives q and k *before* rotation, so that a key may be given another position later (attention sinks)
and a document may go on in the next step. Angles are float64: at position 1e6 a float32 angle is off by 0.06 rad.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.ops.fuse import fused


class Rotation(NamedTuple):
    """Cosines and sines of some positions, ready to broadcast over heads. Computed once, used by every layer."""

    cos: Tensor
    """[..., 1, dim / 2], float32 (float64 for float64 attention)."""
    sin: Tensor
    """[..., 1, dim / 2]."""


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotary embedding of one model: which frequency each pair of dimensions turns with.

    >>> Rope(torch.tensor([1.0, 0.01])).rotation(torch.arange(3)).cos.shape
    torch.Size([3, 1, 2])
    """

    inverse_frequencies: Tensor
    """[dim / 2], radians per position; from the model's config, as `transformers.ROPE_INIT_FUNCTIONS` gives them."""
    attention_scaling: float = 1.0
    """Factor on cosine and sine (YaRN's attention factor); it enters a logit squared."""

    @property
    def dim(self) -> int:
        """The head dimension that this embedding turns."""
        return 2 * self.inverse_frequencies.numel()

    def rotation(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Rotation:
        """The rotation of integer `positions` [...] within their documents, for attention in `dtype`."""
        frequencies = self.inverse_frequencies.to(positions.device, torch.float64)
        angles = (positions.to(torch.float64)[..., None] * frequencies)[..., None, :]
        table = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return Rotation(cos.to(table), sin.to(table))

    def back(self, reach: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Rotation:
        """Turns by 0 to `reach` positions back, to be put after another rotation: [reach + 1, dim / 2]."""
        turns = replace(self, attention_scaling=1.0).rotation(-torch.arange(reach + 1, device=device), dtype)
        return Rotation(*(x.squeeze(1) for x in turns))


def one_after_another(first: Rotation, second: Rotation) -> Rotation:
    """The rotation that two, which broadcast together, come to."""
    return Rotation(first.cos * second.cos - first.sin * second.sin, first.sin * second.cos + first.cos * second.sin)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x [..., heads, dim] turned by `rotation`, computed in the rotation's precision and returned in x's dtype."""
    # Fused, the float32 intermediates of a bfloat16 q never reach memory.
    apply = fused(turn, dynamic=True) if x.is_cuda else turn
    return apply(x, rotation.cos, rotation.sin)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` as plain tensor operations: for a handful of rows, or inside a compiled function."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
