"""The attachment `overflow` as its definition reads: one token after the other, with nothing of the package's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """Of all heads: maps [heads, dim, dim] that are added to the identity, logits of forgetting and of momentum (None:
    the delta rule) [heads], what a query and a key add to the logits of share and step size [heads, dim]."""

    q_map: Tensor
    k_map: Tensor
    alpha_logits: Tensor
    eta_logits: Tensor | None
    share_query: Tensor
    step_key: Tensor


def rotated(x: Tensor, position: int, frequencies: Tensor) -> Tensor:
    """x [dim] turned to a position."""
    half = x.shape[0] // 2
    cos, sin = (position * frequencies).cos(), (position * frequencies).sin()
    return torch.cat([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])


def overflow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta_logits: Tensor,
    share_logits: Tensor,
    weights: Weights,
    *,
    frequencies: Tensor,
    window: int,
    sinks: int,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """One document: q [tokens, heads, dim], k and v [tokens, kv heads, dim] before RoPE, logits [tokens, heads], give
    what goes to the output projection, like q."""
    tokens, heads, dim = q.shape
    group = heads // k.shape[1]
    rows = []
    for head in range(heads):
        source = head // group
        momentum_rate = 0.0 if weights.eta_logits is None else 0.99 * weights.eta_logits[head].sigmoid()
        forget = 0.01 * weights.alpha_logits[head].sigmoid()
        memory = q.new_zeros(dim, dim)
        momentum = q.new_zeros(dim, dim)
        outs = []
        for t in range(tokens):
            scores, values = [], []
            for j in range(t + 1):
                if t - j < window:
                    query, key = rotated(q[t, head], t, frequencies), rotated(k[j, source], j, frequencies)
                elif j < sinks:
                    # Sinks stand right before the window.
                    place = min(t, window + sinks - 1)
                    query, key = rotated(q[t, head], place, frequencies), rotated(k[j, source], j, frequencies)
                else:
                    continue
                scores.append((query * key).sum() / dim**0.5)
                values.append(v[j, source])
            attended = (torch.stack(scores).softmax(0)[:, None] * torch.stack(values)).sum(0)
            left = t - window
            if left >= sinks:
                key = activation(k[left, source] + k[left, source] @ weights.k_map[head])
                key = key / key.norm()
                write = beta_logits[left, head] + (weights.step_key[head] * k[left, source]).sum()
                step = 0.9 * write.sigmoid() * (1 - momentum_rate) ** 2
                momentum = momentum_rate * momentum - step * torch.outer(key, key @ memory - v[left, source])
                memory = (1 - forget) * memory + momentum
                query = activation(q[t, head] + q[t, head] @ weights.q_map[head])
                share = (share_logits[t, head] + (weights.share_query[head] * q[t, head]).sum()).sigmoid()
                attended = (1 - share) * attended + share * ((query / query.norm()) @ memory)
            outs.append(attended)
        rows.append(torch.stack(outs))
    return torch.stack(rows, dim=1)
