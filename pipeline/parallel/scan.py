"""The memory op over sequence ranks that each hold a part of the sequence and all heads.

A part takes the state X = [M; S] before it to P X + c (``pipeline.ops.scan_split`` derives it). Every rank finds its
own P and c, one all-gather makes them known to all, and every rank then joins the parts before its own. What travels is
the size of a few states, 4 (2 Dk)(2 Dk + Dv) bytes per head and rank, however long the sequence is. The exchange of
heads (``pipeline.parallel.exchange``) moves the tokens instead, does half the work, and needs a head per rank.

The backward pass does one more all-gather, of the gradients that the outputs of a part give the state before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.ops.scan import Backend, Rule, State, check_arguments, check_backend
from pipeline.ops.scan_split import (
    Scan,
    add_reads,
    empty_state,
    grad_from_outputs,
    join,
    join_backward,
    scan_backward,
    scan_piece,
)
from pipeline.parallel.topology import Topology


class Place(NamedTuple):
    """Where this rank stands among the ranks of its sequence."""

    group: dist.ProcessGroup
    rank: int
    ranks: int


def sequence_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    *,
    topology: Topology,
    state: State | None = None,
    segment_ids: Tensor | None = None,
    rule: Rule = "titans",
    backend: Backend = "auto",
    chunk: int = 64,
) -> tuple[Tensor, State]:
    """``miras_scan`` of a sequence whose parts lie on the sequence ranks, in their order, with all heads on each.

    The result is that of ``miras_scan`` on the whole sequence, to rounding: values, final state and every gradient.
    Collective, forward and backward: every rank of the group calls it, and its backward pass, in the same order.

    Args:
        q, k, v, alpha, eta, theta: this rank's tokens, as ``miras_scan`` takes them, ``[batch, part, heads, ...]``; the
            parts may differ in length.
        topology: the layout of ranks. With one sequence rank this is ``miras_scan``.
        state: (M, S) before the first token of the *whole* sequence. Every rank gives the same, or every rank None.
        segment_ids: ids of this rank's tokens, ``[batch, part]``; every rank gives them, or none does.

    Returns:
        y of this rank's tokens, and the state after the last token of the whole sequence: the same bits on every rank.

    Gradients follow the convention of data-parallel training, that what is held by all ranks has the sum of their
    gradients: the given state's is on the first rank, zeros elsewhere, and those of the returned state are summed.

    Raises:
        ValueError: as ``miras_scan``.
    """
    check_arguments(q, k, v, alpha, eta, theta, state, segment_ids, rule, chunk)
    # Before any collective: every rank refuses by itself what the backend does not take.
    check_backend(backend, q, k, v, alpha, None if rule == "delta" else eta, theta, state)
    if topology.sequence == 1:
        return Scan(rule, backend, chunk)((q, k, v, alpha, eta, theta), state, segment_ids)
    assert topology.sequence_group is not None
    place = Place(topology.sequence_group, topology.sequence_rank, topology.sequence)
    if state is None:
        zeros = empty_state(q, v)
        state = (zeros, zeros)
    eta = None if rule == "delta" else eta
    y, memory, momentum = _SequenceScan.apply(
        Scan(rule, backend, chunk), place, segment_ids, q, k, v, alpha, eta, theta, *state
    )
    return y, (memory, momentum)


class _SequenceScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scan: Scan, place: Place, segment_ids: Tensor | None, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        *tokens, memory, momentum = inputs
        assert memory is not None and momentum is not None
        with torch.autocast(device_type=memory.device.type, enabled=False):
            piece = scan_piece(scan, tokens, segment_ids)
            local = [piece.matrix, piece.offset]
            if segment_ids is not None:
                local.append(segment_ids[:, [0, -1]].to(torch.int64))
            matrices, offsets, *ids = all_gather(local, place)
            keep = None
            if ids:
                ends = ids[0]
                same_document = ends[1:, :, 0] == ends[:-1, :, 1]
                keep = torch.cat([torch.ones_like(same_document[:1]), same_document])
            first = torch.cat([memory, momentum][: scan.states], dim=-2)
            starts, end = join(first, matrices, offsets, keep)
            start = starts[place.rank].clone()
            y = add_reads(piece, start)
        ctx.save_for_backward(segment_ids, keep, start, matrices, piece.reads, *tokens)
        ctx.scan, ctx.place = scan, place
        after = end.chunk(2, dim=-2)
        return y, after[0].clone(), after[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_memory: Tensor, grad_momentum: Tensor) -> tuple[Any, ...]:
        segment_ids, keep, start, matrices, reads, *tokens = ctx.saved_tensors
        scan, place = ctx.scan, ctx.place
        with torch.autocast(device_type=grad_y.device.type, enabled=False):
            grad_end = torch.cat([grad_memory, grad_momentum], dim=-2)
            local = [grad_from_outputs(reads, grad_y, start.dtype), grad_end]
            from_outputs, grad_ends = all_gather(local, place)
            after = join_backward(matrices, keep, from_outputs, grad_ends.double().sum(dim=0))[place.rank]
            grads, states = scan_backward(scan, tokens, segment_ids, start, grad_y, after)
        if place.rank:
            states = (torch.zeros_like(states[0]), torch.zeros_like(states[1]))
        return (None, None, None, *grads, *states)


def all_gather(tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
    """Each of the tensors, of any dtypes, from every rank: [ranks, ...]. One collective."""
    send = torch.cat([x.contiguous().reshape(-1).view(torch.uint8) for x in tensors])
    received = send.new_empty(place.ranks * send.numel())
    dist.all_gather_into_tensor(received, send, group=place.group)
    sizes = [x.numel() * x.element_size() for x in tensors]
    parts = received.view(place.ranks, -1).split(sizes, dim=1)
    return [part.contiguous().view(x.dtype).view(place.ranks, *x.shape) for part, x in zip(parts, tensors, strict=True)]
