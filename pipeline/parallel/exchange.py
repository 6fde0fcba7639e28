"""The Ulysses exchange: "part of the sequence, all heads" to "all of the sequence, part of the heads" and back.

DeepSpeed-Ulysses (arXiv 2309.14509) does this for attention with one all-to-all per tensor. Here any number of tensors
(queries, keys, values, gates, of any dtypes) travel in one all-to-all, and the memory scan uses the very same exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from pipeline.parallel.topology import Topology

# How a rank cuts a tensor into one part per rank to send, and joins the parts that it receives.
SCATTER_HEADS = "batch sequence (ranks heads) ... -> ranks batch sequence heads ..."
GATHER_SEQUENCE = "ranks batch sequence heads ... -> batch (ranks sequence) heads ..."
SCATTER_SEQUENCE = "batch (ranks sequence) heads ... -> ranks batch sequence heads ..."
GATHER_HEADS = "ranks batch sequence heads ... -> batch sequence (ranks heads) ..."


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
    scatter, join = (SCATTER_HEADS, GATHER_SEQUENCE) if gather else (SCATTER_SEQUENCE, GATHER_HEADS)
    outgoing = []
    parts = []
    for tensor in tensors:
        part = rearrange(tensor, scatter, ranks=degree).contiguous()
        parts.append((part.shape, part.dtype))
        outgoing.append(part.reshape(degree, -1).view(torch.uint8))
    widths = [piece.shape[1] for piece in outgoing]
    send = torch.cat(outgoing, dim=1)
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    results = []
    for piece, (shape, dtype) in zip(received.split(widths, dim=1), parts, strict=True):
        part = piece.contiguous().view(dtype).reshape(shape)
        results.append(rearrange(part, join))
    return results
