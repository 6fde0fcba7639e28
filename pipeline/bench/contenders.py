"""Who takes part in `bench kernels`, by name: the backends of an op, and the peers of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pipeline.bench.kernel_ops import Op, Shape, ops
from pipeline.bench.peers import PEERS, Peer, Run


def peer(op: str, contender: str) -> Peer | None:
    """The peer of that name that does what comes closest to the op, installed or not."""
    return next((peer for peer in PEERS if peer.name == contender and peer.op == op), None)


def computes(op: Op, contender: str) -> bool:
    """Whether a contender computes the op itself, so that the op's reference, FLOPs and bytes apply to it."""
    found = peer(op.name, contender)
    return op.has(contender) or (found is not None and found.exact)


def prepare(op_name: str, contender: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Run:
    """What to call, and its leaves, at a shape. Raises ValueError where the contender cannot take these."""
    op = ops()[op_name]
    return _run(op, contender, op.inputs(shape, dtype, device))


def _run(op: Op, contender: str, inputs: Sequence[Tensor]) -> Run:
    found = peer(op.name, contender)
    if found is not None:
        return found.prepare(inputs)
    return Run(partial(op.call, inputs, contender), list(inputs))


def out_of_memory(error: Exception) -> bool:
    """Whether an allocator had no more to give: torch's on a GPU or a CPU, or C++'s."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in message for words in ("out of memory", "can't allocate memory", "bad_alloc")
    )


def leaves_out(op_name: str, contender: str, error: Exception) -> bool:
    """Whether an error leaves out a contender alone: it does not take a shape, memory is short, or it is a peer."""
    return isinstance(error, ValueError) or out_of_memory(error) or not ops()[op_name].has(contender)


def relative_error(op: Op, contender: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative RMSE of the output and the gradients against PyTorch in float64, at a short length.

    Of a contender that `computes` the op: its leaves are the op's inputs.
    """
    short = Shape(1, min(shape.tokens, op.check_tokens), min(shape.heads, 2), shape.dim)
    inputs = op.inputs(short, dtype, device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for run in (_run(op, contender, inputs), _run(op, "torch", exact)):
        y = run.forward()
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
        results.append([y, *torch.autograd.grad(y, run.leaves, cotangent, materialize_grads=True)])
    worst = 0.0
    for a, b in zip(*results, strict=True):
        size = float(b.detach().norm())
        difference = float((a.detach().double() - b.detach()).norm())
        error = difference / size if size else difference
        worst = error if math.isnan(error) else max(worst, error)
    return worst
