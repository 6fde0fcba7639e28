"""The memory op on the native kernels of kernels/miras_scan: what they take, their gradient, and their check.

The kernels are two ops of the namespace ``mnemos``: ``miras_scan``, which can keep the residuals and the states at
fixed intervals, and ``miras_scan_backward``, which recomputes the rest from them. Both are opaque to torch.compile.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import native
from pipeline.ops.checks import dtype_name
from pipeline.ops.constants import constant_result
from pipeline.ops.scan_torch import scan_torch

OP = "miras_scan"
KEY_DIMS = (32, 64, 128)
VALUE_MULTIPLE = 16
DTYPES = (torch.float32, torch.bfloat16)

WORKSPACE = 2**30
"""`kWorkspace` of kernels/miras_scan/cuda/arguments.cuh."""

# The largest relative RMSE that the check at first use lets pass: ten times what is asked of the kernels in float32,
# twice that in bfloat16, and far below what a wrong binary makes of the numbers.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

# Bytes of shared memory that the most demanding block of the CUDA kernels takes, forward or backward, by dtype and key
# dim. A device of compute capability 8.0 has 166,912, one of 8.6, 8.9 or 12.x 101,376, one of 9.0 or 10.x 232,448.
SHARED_MEMORY = {
    torch.float32: {32: 92_720, 64: 117_760, 128: 151_232},
    torch.bfloat16: {32: 105_472, 64: 131_072, 128: 163_840},
}


def unsupported(backend: str, tensors: dict[str, Tensor]) -> tuple[str, str] | None:
    """The argument that `miras_scan` accepts and the kernels do not, and what they expect; None where they take all.

    ``tensors`` are the arguments by name, from q, k and v to the state. Their shapes fit each other.
    """
    q, v = tensors["q"], tensors["v"]
    if q.device.type != backend:
        return "q", f"a {backend} tensor"
    for name, tensor in tensors.items():
        if name not in ("q", "k", "v"):
            if tensor.dtype != torch.float32:
                return name, "float32"
        elif tensor.dtype not in DTYPES:
            return name, "float32 or bfloat16"
        elif tensor.dtype != q.dtype:
            return name, f"the dtype of q, {dtype_name(q.dtype)}"
    if q.shape[-1] not in KEY_DIMS:
        return "q", "a key dim of 32, 64 or 128"
    if v.shape[-1] % VALUE_MULTIPLE:
        return "v", f"a value dim that is a multiple of {VALUE_MULTIPLE}"
    if 0 in v.shape:
        return "v", "no dimension of 0"
    return None


# Called while tracing, both answers are constants of the graph.
@constant_result
def fits(device: str, dtype: torch.dtype, key_dim: int) -> bool:
    """Whether to use the kernel for tokens of a dtype and key dim on a device, ``cpu`` or ``cuda:INDEX``.

    One that is built but fails its check is not used, with one warning.
    """
    return native.fits(_kernel(device, dtype, key_dim))


@constant_result
def why_not(device: str, dtype: torch.dtype, key_dim: int) -> str | None:
    """None where the kernel can be used. Loads the library and checks the kernel against PyTorch, each once."""
    return native.refusal(_kernel(device, dtype, key_dim))


def _kernel(device: str, dtype: torch.dtype, key_dim: int) -> native.Kernel:
    case = f"{dtype_name(dtype)}, key dim {key_dim}"
    check = functools.partial(self_check, device, dtype, key_dim)
    return native.Kernel(OP, device, case, _register, check, TOLERANCE[dtype], SHARED_MEMORY[dtype][key_dim])


def scan_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    *,
    state: tuple[Tensor, Tensor] | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``miras_scan`` for arguments that the kernels can take; ``eta`` None is the rule without momentum."""
    batch, _, heads, key_dim = q.shape
    zeros = q.new_zeros(batch, heads, key_dim, v.shape[-1], dtype=torch.float32)
    memory, momentum = (zeros, zeros) if state is None else state
    if eta is None:
        # S before the first token has no part in the rule, whatever it holds.
        eta, momentum = torch.zeros_like(alpha), zeros
    resets = None
    if segment_ids is not None:
        resets = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=False)
    tensors = [x.contiguous() for x in (q, k, v, alpha, eta, theta, memory, momentum)]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    y, memory, momentum, _, _ = torch.ops.mnemos.miras_scan(*tensors, resets, interval(key_dim, q.dtype), save)
    return y, (memory, momentum)


def interval(key_dim: int, dtype: torch.dtype) -> int:
    """Tokens between the states that are kept for the backward pass.

    M and S take 8 key dim x value dim bytes. Where both dims are the same that is half of what q, k, v and y of an
    interval take in float32 (all of it at key dim 32), and a quarter in bfloat16, where the float32 residuals take half
    already; the states between are recomputed. A multiple of 64, which is the chunk of the kernels.
    """
    return max(64, key_dim) if dtype == torch.float32 else 4 * key_dim


def kept_bytes(rows: int, sequence: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
    """What a call keeps for the backward pass; ``rows`` is batch x heads.

    Per row and token: q, k and v, three gates and the residuals; and M and S before every interval.
    """
    tokens = rows * sequence * (dtype.itemsize * (2 * key_dim + value_dim) + 12 + 4 * value_dim)
    return tokens + rows * -(-sequence // interval(key_dim, dtype)) * 8 * key_dim * value_dim


def workspace_bytes(rows: int, sequence: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
    """Scratch memory of a training call on CUDA, of its forward or its backward pass, whichever has more.

    Its kernels work on spans of chunks of 64 tokens that keep what lies between them within `WORKSPACE`, a whole
    interval between kept states at least (kernels/miras_scan/cuda/program.cuh). ``rows`` is batch x heads.
    """
    count = -(-sequence // 64)
    every = min(interval(key_dim, dtype) // 64, count)
    state = key_dim * value_dim
    square, coefficients = 64 * 64, 8 * 64

    def scratch(floats: int, multiple: int) -> int:
        span = max(WORKSPACE // (4 * floats * rows) // multiple * multiple, multiple)
        return 4 * floats * rows * min(span, count)

    kept = every == 1
    forward = scratch(2 * square + coefficients + (0 if kept else 2 * state), 1)
    backward = scratch(square + coefficients + 64 * value_dim + (2 if kept else 4) * state, every)
    return max(forward, backward)


@functools.cache
def _register() -> None:
    torch.library.register_fake(f"mnemos::{OP}", _fake)
    torch.library.register_fake(f"mnemos::{OP}_backward", _fake_backward)
    torch.library.register_autograd(f"mnemos::{OP}", _backward, setup_context=_setup)
    torch.library.register_autograd(f"mnemos::{OP}_backward", _backward_twice)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    memory: Tensor,
    momentum: Tensor,
    resets: Tensor | None,
    interval: int,
    save: bool,
) -> tuple[Tensor, ...]:
    batch, sequence, heads, value_dim = v.shape
    y, memory_after, momentum_after = (
        v.new_empty(v.shape),
        memory.new_empty(memory.shape),
        memory.new_empty(memory.shape),
    )
    if not save:
        return y, memory_after, momentum_after, memory.new_empty(0), memory.new_empty(0)
    residuals = memory.new_empty(batch, heads, sequence, value_dim)
    count = (sequence + interval - 1) // interval
    states = memory.new_empty(batch, heads, count, 2, q.shape[-1], value_dim)
    return y, memory_after, momentum_after, residuals, states


def _fake_backward(
    grad_y: Tensor,
    grad_memory: Tensor,
    grad_momentum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    resets: Tensor | None,
    residuals: Tensor,
    states: Tensor,
    interval: int,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, alpha, eta, theta, grad_memory, grad_momentum))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tokens_and_gates, _memory, _momentum, resets, interval, save = inputs
    _, _, _, residuals, states = output
    ctx.mark_non_differentiable(residuals, states)
    ctx.set_materialize_grads(False)
    ctx.saves, ctx.interval = save, interval
    ctx.save_for_backward(*tokens_and_gates, resets, residuals, states)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_memory: Tensor | None, grad_momentum: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if not ctx.saves:
        raise RuntimeError("mnemos::miras_scan was called with save=False, which keeps nothing for a backward pass")
    q, k, v, alpha, eta, theta, resets, residuals, states = ctx.saved_tensors
    state = states[:, :, 0, 0]
    gradients = torch.ops.mnemos.miras_scan_backward(
        torch.zeros_like(v) if grad_y is None else grad_y.contiguous(),
        *(state.new_zeros(state.shape) if grad is None else grad.contiguous() for grad in (grad_memory, grad_momentum)),
        *(q, k, v, alpha, eta, theta, resets, residuals, states, ctx.interval),
    )
    return *gradients, None, None, None


def _backward_twice(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "miras_scan is differentiable once: its backward pass has no gradient of its own. backend='torch' in float64"
        " takes finite differences, and no backend second derivatives"
    )


def self_check(device: str, dtype: torch.dtype, key_dim: int) -> float:
    """The largest relative RMSE of values and gradients against the PyTorch path, in float64 on the CPU.

    Two rows, one of which starts a segment on the way, more than one chunk, and a ragged end.
    """
    rng = torch.Generator().manual_seed(0)
    batch, sequence, heads = 2, 72, 2
    state = (batch, heads, key_dim, key_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64, device="cpu")

    def gate(largest: float) -> Tensor:
        return largest * torch.rand(batch, sequence, heads, generator=rng, dtype=torch.float64, device="cpu")

    q, k = (F.normalize(normal(batch, sequence, heads, key_dim), dim=-1).to(dtype) for _ in range(2))
    v, grad_y = (normal(batch, sequence, heads, key_dim).to(dtype) for _ in range(2))
    eta = gate(0.9)
    gates = [x.float() for x in (gate(0.01), eta, 0.9 * gate(1.0) * (1 - eta) ** 2)]
    states = [normal(*state).float() for _ in range(4)]
    segment_ids = torch.zeros(batch, sequence, dtype=torch.int64, device="cpu")
    segment_ids[1, 30:] = 1

    # This runs in a thread of its own, where autograd is in its initial mode.
    inputs = [x.double().requires_grad_() for x in (q, k, v, *gates, *states[:2])]
    y, after = scan_torch(*inputs[:6], state=(inputs[6], inputs[7]), segment_ids=segment_ids, chunk=64)
    expected = [y, *after]
    expected += torch.autograd.grad(expected, inputs, [x.double() for x in (grad_y, *states[2:])])

    q, k, v, grad_y, *rest = (x.to(device) for x in (q, k, v, grad_y, *gates, *states))
    resets = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=False).to(device)
    gates, before, grads = rest[:3], rest[3:5], rest[5:]
    every = interval(key_dim, dtype)
    *actual, residuals, kept = torch.ops.mnemos.miras_scan(q, k, v, *gates, *before, resets, every, True)
    actual += torch.ops.mnemos.miras_scan_backward(grad_y, *grads, q, k, v, *gates, resets, residuals, kept, every)
    errors = [_error(a, b) for a, b in zip(actual, expected, strict=True)]
    # max() would pass over a NaN that is not the first.
    return max(errors) if all(error == error for error in errors) else float("nan")


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().cpu().double() - expected.detach()).norm() / expected.detach().norm())
