"""The truth that the chunk-start scans are held to: the rules as written, token by token, in float64, plain autograd.

Gradients of deep memories come from autograd on their loss, not from formulas. One row of the batch and one head at a
time; nothing is shared with the package but the meaning of the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]


def every_memory(
    one: Callable[..., tuple[Tensor, Tensor, Tensor]],
    tokens: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    state: State,
    segment_ids: Tensor | None,
) -> tuple[Tensor, State]:
    """Runs ``one(*tokens [T, ...], *weights, M, S, breaks)`` for every batch row and head, and stacks the results.

    ``tokens`` [B, T, H, ...] or None, ``weights`` [H, ...], ``state`` [B, H, R, D]; breaks[t] says that a segment
    starts at t.
    """
    rows, length, heads = next(x for x in tokens if x is not None).shape[:3]
    outputs = []
    for row in range(rows):
        breaks = [False] * length
        if segment_ids is not None:
            breaks = [t > 0 and bool(segment_ids[row, t] != segment_ids[row, t - 1]) for t in range(length)]
        for head in range(heads):
            parts = [None if x is None else x[row, :, head].double() for x in tokens]
            own = [w[head].double() for w in weights]
            outputs.append(one(*parts, *own, *(part[row, head].double() for part in state), breaks))
    y, memory, momentum = (torch.stack(list(parts)) for parts in zip(*outputs, strict=True))
    y = y.unflatten(0, (rows, heads)).transpose(1, 2)
    return y, (memory.unflatten(0, (rows, heads)), momentum.unflatten(0, (rows, heads)))


def limited(gradients: Sequence[Tensor], clip: float | None) -> list[Tensor]:
    """Gradients of one token, shortened together to the norm ``clip``."""
    norm = sum((g.square().sum() for g in gradients), torch.zeros((), dtype=torch.float64)).sqrt()
    if clip is None or norm <= clip:
        return list(gradients)
    return [g * (clip / norm) for g in gradients]


def dual_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    *,
    state: State,
    chunk: int,
    error: Callable[[Tensor, Tensor | None], Tensor],
    link: Callable[[Tensor], Tensor],
    threshold: Tensor | None = None,
    clip: float | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Gradients at the chunk's start, reads through every token's own link; ``dual_scan``'s shapes and meaning."""

    def one(q, k, v, alpha, eta, theta, threshold, dual, momentum, breaks):
        reads = []
        for t in range(len(q)):
            if breaks[t]:
                dual, momentum = torch.zeros_like(dual), torch.zeros_like(momentum)
            if t % chunk == 0 or breaks[t]:
                found = dual
            signal = error(k[t] @ link(found) - v[t], None if threshold is None else threshold[t])
            (gradient,) = limited([torch.outer(k[t], signal)], clip)
            momentum = (0.0 if eta is None else eta[t]) * momentum - theta[t] * gradient
            dual = (1 - alpha[t]) * dual + momentum
            reads.append(q[t] @ link(dual))
        return torch.stack(reads), dual, momentum

    return every_memory(one, (q, k, v, alpha, eta, theta, threshold), (), state, segment_ids)


def mlp_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    initial: tuple[Tensor, Tensor],
    *,
    state: State,
    chunk: int,
    clip: float | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, State]:
    """A perceptron with one hidden layer; ``mlp_scan``'s shapes and meaning."""

    def apply(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        return torch.nn.functional.gelu(weights[0] @ x) @ weights[1]

    def one(q, k, v, alpha, eta, theta, first, second, offset, momentum, breaks):
        initial, reads = torch.cat([first, second]), []
        for t in range(len(q)):
            if breaks[t]:
                offset, momentum = torch.zeros_like(offset), torch.zeros_like(momentum)
            if t % chunk == 0 or breaks[t]:
                found = initial + offset
            weights = found.chunk(2)
            loss = 0.5 * (apply(k[t], weights) - v[t]).square().sum()
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            gradient = torch.cat(limited(gradients, clip))
            momentum = (0.0 if eta is None else eta[t]) * momentum - theta[t] * gradient
            offset = (1 - alpha[t]) * offset + momentum
            reads.append(apply(q[t], (initial + offset).chunk(2)))
        return torch.stack(reads), offset, momentum

    return every_memory(one, (q, k, v, alpha, eta, theta), initial, state, segment_ids)


def orthogonalised(x: Tensor, steps: int = 5) -> Tensor:
    """Muon's quintic as a power series of one matrix."""
    x = x / torch.linalg.matrix_norm(x)
    for _ in range(steps):
        cube = x @ x.T @ x
        x = 3.4445 * x - 4.7750 * cube + 2.0315 * (cube @ x.T @ x)
    return x


def swiglu_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    initial: tuple[Tensor, Tensor, Tensor],
    *,
    state: State,
    chunk: int,
    muon: bool = False,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, State]:
    """SwiGLU weights, read by a chunk and then updated with it; ``swiglu_scan``'s shapes and meaning."""

    def apply(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        gate, up, down = weights
        return (torch.nn.functional.silu(gate @ x) * (up @ x)) @ down

    def one(q, k, v, alpha, eta, theta, gate, up, down, offset, momentum, breaks):
        initial, reads = torch.cat([gate, up, down]), []
        for start in range(0, len(q), chunk):
            tokens = list(range(start, min(start + chunk, len(q))))
            pending: list[int] = []
            for t in tokens:
                if breaks[t]:
                    # Another segment: what this chunk collected belongs to the one before, and ends with it.
                    pending, offset, momentum = [], torch.zeros_like(offset), torch.zeros_like(momentum)
                reads.append(apply(q[t], (initial + offset).chunk(3)))
                pending.append(t)
            weights = (initial + offset).chunk(3)
            gain = sum(theta[t] * (apply(k[t], weights) @ v[t]) for t in pending)
            update = torch.cat(torch.autograd.grad(gain, weights, create_graph=True))
            if eta is not None:
                update = torch.stack([eta[t] for t in pending]).mean() * momentum + update
            momentum = update
            keep = torch.stack([1 - alpha[t] for t in pending]).prod()
            steps = torch.cat([orthogonalised(part) for part in update.chunk(3)]) if muon else update
            moved = [w.clone() for w in (initial + keep * offset + steps).chunk(3)]
            for index, wanted in enumerate((gate, up, down)):
                dim = 0 if index == 2 else 1
                moved[index] = torch.nn.functional.normalize(moved[index], dim=dim) * wanted.norm(dim=dim, keepdim=True)
            offset = torch.cat(moved) - initial
        return torch.stack(reads), offset, momentum

    return every_memory(one, (q, k, v, alpha, eta, theta), initial, state, segment_ids)
