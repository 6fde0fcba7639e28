"""A linear layer with ReLU that is called many times with few rows, at fixed weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST = 16
"""Calls for which it pays to pack a weight, which takes as long as two or three of them."""


def packed_relu(weight: Tensor, bias: Tensor, rows: int, calls: int) -> Callable[[Tensor], Tensor]:
    """ReLU(x W^T + b) of x [rows, in], or of fewer rows, without gradient.

    A general product packs the weight anew at each call, which for few rows takes as long as the product itself. oneDNN
    packs it once (as torch.compile has it do for frozen weights) and applies the ReLU as it writes: in float32 on a
    CPU, where at least `FEWEST` `calls` are to be made.
    """
    if calls < FEWEST or not _packs(weight):
        return lambda x: F.relu(F.linear(x, weight, bias))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "relu", [], "")


def _packs(weight: Tensor) -> bool:
    backend = torch.backends.mkldnn
    usable = backend.is_available() and bool(backend.enabled)
    return usable and weight.device.type == "cpu" and weight.dtype == torch.float32
