"""The elementwise affine scan: h_t = a_t h_{t-1} + b_t, the recurrence of gated linear layers."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import affine_scan_native
from pipeline.ops.affine_scan_torch import affine_scan_torch

Backend = Literal["auto", "torch", "cpu", "cuda"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def affine_scan(
    a: Tensor,
    b: Tensor,
    *,
    state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence h_t = a_t h_{t-1} + b_t, elementwise, over every token in order.

    The sums are in float32, or float64 when a or b is, whatever the dtype of h, also under autocast. There are no
    divisions and no logarithms: a may be any real number, and exactly 0. Everything is differentiable once, the given
    and the returned state included. The same call gives the same bits.

    Args:
        a: factor per token, ``[batch, sequence, *features]``; float64, float32 or bfloat16, not necessarily
            b's dtype: 1 - 1e-3 is 1 in bfloat16. A feature dimension may be 1, for a factor that features share.
        b: input per token, ``[batch, sequence, *features]``; float64, float32 or bfloat16.
        state: h before the first token, ``[batch, *features]``; float32, or float64 when a or b is. Zeros when None.
        segment_ids: ``[batch, sequence]``, any integer type. The state restarts at zero where the id differs from the
            token before; ``state`` belongs to the first token's segment. Nothing crosses a border, a NaN neither.
        backend: ``auto`` takes the fastest that fits and copies what is not contiguous; ``torch`` runs on any device;
            ``cpu`` and ``cuda`` are the native kernels, for float32 and bfloat16.

    Returns:
        h, ``[batch, sequence, *features]`` in b's dtype, and the state after the last token, ``[batch, *features]`` in
        the state's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or layout; the message names it.

    Source: prefix sums of affine maps (Blelloch, "Prefix Sums and Their Applications", 1990, section 1.4.1).
    """
    wide = _check(a, b, state, segment_ids)
    chosen = _choose(a, b, state, backend)
    resets = None
    if segment_ids is not None:
        resets = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=False)
    batch, sequence, features = b.shape[0], b.shape[1], b.shape[2:]
    initial = b.new_zeros(batch, *features, dtype=wide) if state is None else state
    flat = (a.expand(b.shape).flatten(2), b.flatten(2)) if features else (a.unsqueeze(-1), b.unsqueeze(-1))
    initial = initial.flatten(1) if features else initial.unsqueeze(-1)
    if chosen == "torch":
        # Autocast may change the dtype of a sum.
        with torch.autocast(device_type=b.device.type, enabled=False):
            h, after = affine_scan_torch(*flat, initial, resets)
    else:
        first, second, third = (x.contiguous() for x in (*flat, initial))
        h, after = affine_scan_native.affine_scan_native(first, second, third, resets)
    return h.reshape(batch, sequence, *features), after.reshape(batch, *features)


def _check(a: Tensor, b: Tensor, state: Tensor | None, segment_ids: Tensor | None) -> torch.dtype:
    """The dtype of the sums, for arguments that agree."""
    if b.dim() < 2 or b.shape[1] == 0:
        raise ValueError(f"b has shape {_shape(b)}; expected [batch, sequence, *features] with a token at least")
    shared = tuple(1 if i > 1 and n == 1 else m for i, (n, m) in enumerate(zip(a.shape, b.shape, strict=False)))
    if a.dim() != b.dim() or a.shape != shared:
        ones = ", or 1 in place of a feature dimension" if b.dim() > 2 else ""
        raise ValueError(f"a has shape {_shape(a)}; expected that of b, {_shape(b)}{ones}")
    for name, tokens in (("a", a), ("b", b)):
        _check_dtype(name, tokens, _DTYPES)
    _check_device("a", a, b)
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    if state is not None:
        expected = [b.shape[0], *b.shape[2:]]
        if list(state.shape) != expected:
            raise ValueError(f"state has shape {_shape(state)}; expected {expected}")
        _check_dtype("state", state, (wide,))
        _check_device("state", state, b)
    if segment_ids is not None:
        if segment_ids.shape != b.shape[:2]:
            raise ValueError(f"segment_ids has shape {_shape(segment_ids)}; expected {list(b.shape[:2])}")
        if segment_ids.is_floating_point() or segment_ids.is_complex() or segment_ids.dtype == torch.bool:
            raise ValueError(f"segment_ids is {_name(segment_ids.dtype)}; expected an integer type")
        _check_device("segment_ids", segment_ids, b)
    return wide


def _choose(a: Tensor, b: Tensor, state: Tensor | None, backend: str) -> str:
    """``torch`` or ``native``."""
    kind = b.device.type
    device = f"cuda:{b.device.index}" if kind == "cuda" else kind
    if backend == "torch":
        return backend
    if backend == "auto":
        fits = kind in ("cpu", "cuda") and affine_scan_native.fits(device, a.dtype, b.dtype)
        return "native" if fits else "torch"
    if backend not in ("cpu", "cuda"):
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'torch', 'cpu' or 'cuda'")
    for name, x in (("a", a), ("b", b), ("state", state)):
        if x is None:
            continue
        wrong = None
        if x.device.type != backend:
            wrong = f"a {backend} tensor"
        elif x.dtype not in affine_scan_native.DTYPES:
            wrong = "float32 or bfloat16"
        elif not x.is_contiguous():
            wrong = "a contiguous tensor, and makes no copy"
        if wrong is not None:
            found = f"{name} is {_name(x.dtype)} {_shape(x)} with strides {list(x.stride())} on {x.device}"
            raise ValueError(f"{found}; backend {backend!r} expects {wrong}: use 'auto' or 'torch'")
    if (failure := affine_scan_native.why_not(device, a.dtype, b.dtype)) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {failure}: use 'auto' or 'torch'")
    return "native"


def _check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} is {_name(tensor.dtype)}; expected {' or '.join(map(_name, allowed))}")


def _check_device(name: str, tensor: Tensor, b: Tensor) -> None:
    if tensor.device != b.device:
        raise ValueError(f"{name} is on {tensor.device}; expected the device of b, {b.device}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
