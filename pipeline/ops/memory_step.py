"""One token of the memory op `miras_scan`, in place: what decoding does instead of a chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.ops import memory_step_native, native
from pipeline.ops.checks import (
    GATES,
    TOKENS,
    cannot_run,
    check_backend_name,
    check_tensor,
    not_taken,
    sum_dtype,
)
from pipeline.ops.memory_step_torch import memory_step_torch
from pipeline.ops.scan import Backend


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
    backend: Backend = "auto",
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
        out: where to put y; a new tensor when None. It may not share memory with another argument.
        backend: ``auto`` takes the native kernel of q's device where it is built, passes its check at first use, and
            takes the arguments: key dim 32, 64 or 128, value dim a multiple of 16, q, k, v and out all float32 or all
            bfloat16 (float32 copies where q is float16), gates and states float32, states and out contiguous. Else it
            takes the PyTorch path, as ``torch`` always does. ``cpu`` and ``cuda`` name a native kernel, and refuse what
            it does not take.

    Returns:
        y, ``[rows, heads, value dim]`` in v's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or one that a backend asked for by name does not
            take, and the message names it; or that backend is not built, or fails its check.

    Source: `miras_scan`, of which this is a sequence of one token.
    """
    if (y := _quick(q, k, v, alpha, eta, theta, memory, momentum, out, backend)) is not None:
        return y
    check_backend_name(backend)
    _check(q, k, v, alpha, eta, theta, memory, momentum, out)
    y = torch.empty_like(v, memory_format=torch.contiguous_format) if out is None else out
    # No kernel takes float16, and those for float32 lose nothing of it.
    half = backend == "auto" and q.dtype == torch.float16
    tokens = (q.float(), k.float(), v.float()) if half else (q, k, v)
    to = torch.empty_like(y, dtype=torch.float32) if half else y
    arguments = (*tokens, alpha, eta, theta, memory, momentum, to)
    with torch.no_grad(), torch.autocast(device_type=q.device.type, enabled=False):
        if _runs_natively(backend, *arguments):
            memory_step_native.memory_step_native(*arguments)
        else:
            memory_step_torch(*arguments)
        return y.copy_(to) if half else y


def _quick(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    memory: Tensor,
    momentum: Tensor,
    out: Tensor | None,
    backend: str,
) -> Tensor | None:
    """The step by a kernel that has passed its check, which looks at its arguments itself: what Python says of them
    takes longer than the step. None where the kernel refuses them; it has changed nothing then."""
    if backend == "torch" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    device = q.device
    if not memory_step_native.ready(device, q.dtype, q.shape[-1]) or backend not in ("auto", device.type):
        return None
    y = torch.empty_like(v, memory_format=torch.contiguous_format) if out is None else out
    try:
        memory_step_native.memory_step_native(q, k, v, alpha, eta, theta, memory, momentum, y)
    except RuntimeError:
        return None
    return y


def _runs_natively(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    memory: Tensor,
    momentum: Tensor,
    out: Tensor,
) -> bool:
    """Whether a native kernel takes a call; that one named does not is an error."""
    kind = q.device.type
    if backend == "torch" or (backend == "auto" and kind not in native.KINDS):
        return False
    tensors = {
        "q": q, "k": k, "v": v, "alpha": alpha, "theta": theta, "memory": memory, "momentum": momentum, "out": out
    }  # fmt: skip
    if eta is not None:
        tensors["eta"] = eta
    wrong = memory_step_native.unsupported(kind if backend == "auto" else backend, tensors)
    if wrong is not None:
        if backend == "auto":
            return False
        raise not_taken(backend, wrong[0], tensors[wrong[0]], wrong[1])
    where = (native.place(q.device), q.dtype, q.shape[-1])
    if backend == "auto":
        return memory_step_native.fits(*where)
    if (failure := memory_step_native.why_not(*where)) is not None:
        raise cannot_run(backend, failure)
    return True


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
