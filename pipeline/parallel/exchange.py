"""The Ulysses exchange: "part of the sequence, all heads" to "all of the sequence, part of the heads" and back.

DeepSpeed-Ulysses (arXiv 2309.14509) does this for attention with one all-to-all per tensor. Here any number of tensors
(queries, keys, values, gates, of any dtypes) travel in one all-to-all, and the memory scan uses the very same exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.topology import Topology


def to_heads(tensors: Sequence[Tensor], topology: Topology) -> list[Tensor]:
    """Gathers the sequence and scatters the heads, in one all-to-all, differentiably.

    Each tensor is [batch, sequence / degree, heads, ...] and comes back as [batch, sequence, heads / degree, ...];
    rank r of the sequence group keeps heads r * heads / degree and on. Raises ValueError when the degree does not
    divide the heads.
    """
    if topology.sequence == 1:
        return list(tensors)
    for index, tensor in enumerate(tensors):
        if tensor.shape[2] % topology.sequence:
            raise ValueError(
                f"tensors[{index}] has shape {tuple(tensor.shape)}: its {tensor.shape[2]} heads cannot be divided over"
                f" {topology.sequence} sequence ranks"
            )
    return list(_Exchange.apply(topology.sequence_group, True, *tensors))


def to_sequence(tensors: Sequence[Tensor], topology: Topology) -> list[Tensor]:
    """The inverse of `to_heads`: [batch, sequence, heads / degree, ...] to [batch, sequence / degree, heads, ...]."""
    if topology.sequence == 1:
        return list(tensors)
    for index, tensor in enumerate(tensors):
        if tensor.shape[1] % topology.sequence:
            raise ValueError(
                f"tensors[{index}] has shape {tuple(tensor.shape)}: its {tensor.shape[1]} tokens cannot be divided over"
                f" {topology.sequence} sequence ranks"
            )
    return list(_Exchange.apply(topology.sequence_group, False, *tensors))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, gather: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.gather = group, gather
        return tuple(_all_to_all(list(tensors), group, gather))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        # Materialised gradients: an output that nobody used still takes part in the collective with zeros.
        back = _all_to_all(list(gradients), ctx.group, not ctx.gather)
        return (None, None, *back)


def _all_to_all(tensors: list[Tensor], group: dist.ProcessGroup, gather: bool) -> list[Tensor]:
    degree = dist.get_world_size(group)
    # Dimension that is scattered over the ranks on the way out; the other one is gathered on the way in.
    scattered = 2 if gather else 1
    outgoing = []
    parts = []
    for tensor in tensors:
        shape = tensor.shape
        split = tensor.reshape(*shape[:scattered], degree, shape[scattered] // degree, *shape[scattered + 1 :])
        part = split.movedim(scattered, 0).contiguous()
        parts.append((part.shape, part.dtype))
        outgoing.append(part.reshape(degree, -1).view(torch.uint8))
    widths = [piece.shape[1] for piece in outgoing]
    send = torch.cat(outgoing, dim=1)
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    results = []
    for piece, (shape, dtype) in zip(received.split(widths, dim=1), parts, strict=True):
        part = piece.contiguous().view(dtype).reshape(shape)
        gathered = 1 if gather else 2
        joined = part.movedim(0, gathered)
        results.append(joined.flatten(gathered, gathered + 1))
    return results
