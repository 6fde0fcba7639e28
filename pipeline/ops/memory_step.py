"""One token of the memory op `miras_scan`, in place: what decoding does instead of a chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.ops.checks import GATES, TOKENS, check_tensor, sum_dtype


def memory_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    memory: Tensor,
    momentum: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Write one token per row into a matrix memory by one gradient step, and read it. Has no gradient.

    Per row and head, with q, k and v as row vectors, M and S changed in place::

        g = k^T (k M - v)
        S = eta S - theta g
        M = (1 - alpha) M + S
        y = q M

    Args:
        q, k: ``[rows, heads, key dim]``; float64, float32, bfloat16 or float16.
        v: ``[rows, heads, value dim]``, alike.
        alpha, eta, theta: gates ``[rows, heads]``, float32 or float64. eta None: no momentum; S then becomes the last
            update, whatever it was.
        memory, momentum: M and S ``[rows, heads, key dim, value dim]``, float32 (float64 when q is); changed in place.
        out: where to put y; a new tensor when None.

    Returns:
        y, ``[rows, heads, value dim]`` in v's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, and the message names it.

    Source: `miras_scan`, of which this is a sequence of one token.
    """
    _check(q, k, v, alpha, eta, theta, memory, momentum, out)
    with torch.no_grad(), torch.autocast(device_type=q.device.type, enabled=False):
        return _step_torch(q, k, v, alpha, eta, theta, memory, momentum, out)


def write(
    k: Tensor, signal: Tensor, alpha: Tensor, eta: Tensor | None, theta: Tensor, memory: Tensor, momentum: Tensor
) -> None:
    """S = eta S - theta k^T signal and M = (1 - alpha) M + S, in place, for gradients k^T signal of any rule.

    k [rows, heads, key dim], signal [rows, heads, value dim], both in the states' dtype; the rest as `memory_step`.
    """
    step = k * -theta.unsqueeze(-1)
    step = step.unsqueeze(-1) * signal.unsqueeze(-2)
    if eta is None:
        momentum.copy_(step)
    else:
        momentum.mul_(eta[..., None, None]).add_(step)
    memory.mul_(1 - alpha[..., None, None]).add_(momentum)


def _step_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    memory: Tensor,
    momentum: Tensor,
    out: Tensor | None,
) -> Tensor:
    k = k.to(memory.dtype)
    residual = (k.unsqueeze(-2) @ memory).squeeze(-2) - v
    write(k, residual, alpha, eta, theta, memory, momentum)
    y = (q.to(memory.dtype).unsqueeze(-2) @ memory).squeeze(-2)
    return y.to(v.dtype) if out is None else out.copy_(y)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    memory: Tensor,
    momentum: Tensor,
    out: Tensor | None,
) -> None:
    if q.dim() != 3:
        raise ValueError(f"q has shape {list(q.shape)}; expected [rows, heads, key dim]")
    rows, heads, key_dim = q.shape
    if v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v has shape {list(v.shape)}; expected [{rows}, {heads}, value dim]")
    for name, tokens in (("q", q), ("k", k)):
        check_tensor(name, tokens, q.shape, TOKENS, q)
    check_tensor("v", v, v.shape, TOKENS, q)
    for name, gate in (("alpha", alpha), ("eta", eta), ("theta", theta)):
        if gate is not None:
            check_tensor(name, gate, q.shape[:2], GATES, q)
    for name, state in (("memory", memory), ("momentum", momentum)):
        check_tensor(name, state, (rows, heads, key_dim, v.shape[-1]), (sum_dtype(q),), q)
    if out is not None:
        check_tensor("out", out, v.shape, (v.dtype,), q)
