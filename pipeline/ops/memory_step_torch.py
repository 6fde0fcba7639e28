"""One token of the memory op in PyTorch: any device, any dtype."""

from __future__ import annotations

from torch import Tensor


def memory_step_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    memory: Tensor,
    momentum: Tensor,
    out: Tensor,
) -> None:
    """``memory_step`` for arguments that it has checked, into ``out``."""
    k = k.to(memory.dtype)
    residual = (k.unsqueeze(-2) @ memory).squeeze(-2) - v
    write_(k, residual, alpha, eta, theta, memory, momentum)
    out.copy_((q.to(memory.dtype).unsqueeze(-2) @ memory).squeeze(-2))


def write_(
    k: Tensor, signal: Tensor, alpha: Tensor, eta: Tensor | None, theta: Tensor, memory: Tensor, momentum: Tensor
) -> None:
    """S = eta S - theta k^T signal and M = (1 - alpha) M + S in place, for the gradient k^T signal of any rule.

    k [rows, heads, key dim] and signal [rows, heads, value dim], in the states' dtype; eta None: S is the last update;
    all else as in `memory_step`.
    """
    step = (k * -theta.unsqueeze(-1)).unsqueeze(-1) * signal.unsqueeze(-2)
    if eta is None:
        momentum.copy_(step)
    else:
        momentum.mul_(eta[..., None, None]).add_(step)
    memory.mul_(1 - alpha[..., None, None]).add_(momentum)
