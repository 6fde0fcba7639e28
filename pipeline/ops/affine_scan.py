"""The elementwise affine scan: h_t = a_t h_{t-1} + b_t, the recurrence of gated linear layers."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pipeline.ops import affine_scan_native, native
from pipeline.ops.affine_scan_torch import affine_scan_torch
from pipeline.ops.checks import (
    TOKENS,
    cannot_run,
    check_backend_name,
    check_device,
    check_dtype,
    check_segment_ids,
    check_tensor,
    not_taken,
    sum_dtype,
)

Backend = Literal["auto", "torch", "cpu", "cuda"]


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
        a: factor per token, ``[batch, sequence, *features]``; float64, float32, bfloat16 or float16, not necessarily
            b's dtype: 1 - 1e-3 is 1 in bfloat16. A feature dimension may be 1, for a factor that features share.
        b: input per token, ``[batch, sequence, *features]``; float64, float32, bfloat16 or float16.
        state: h before the first token, ``[batch, *features]``; float32, or float64 when a or b is. Zeros when None.
        segment_ids: ``[batch, sequence]``, any integer type. The state restarts at zero where the id differs from the
            token before; ``state`` belongs to the first token's segment. Nothing crosses a border, a NaN neither.
        backend: ``auto`` takes the fastest that fits; ``torch`` runs on any device; ``cpu`` and ``cuda`` are the native
            kernels, for float32 and bfloat16. Every backend takes strided tensors, of which a native kernel gets
            contiguous copies.

    Returns:
        h, ``[batch, sequence, *features]`` in b's dtype, and the state after the last token, ``[batch, *features]`` in
        the state's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or one that a backend asked for by name does
            not take, and the message names it; or that backend is not built, or fails its check.

    Source: prefix sums of affine maps (Blelloch, "Prefix Sums and Their Applications", 1990, section 1.4.1).
    """
    accumulate_dtype = _check(a, b, state, segment_ids)
    chosen = _choose(a, b, state, backend)
    resets = None
    if segment_ids is not None:
        resets = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=False)
    batch, sequence, features = b.shape[0], b.shape[1], b.shape[2:]
    initial = b.new_zeros(batch, *features, dtype=accumulate_dtype) if state is None else state
    a, b = (rearrange(x, "batch sequence ... -> batch sequence (...)") for x in (a.expand(b.shape), b))
    initial = rearrange(initial, "batch ... -> batch (...)")
    if chosen == "torch":
        # Autocast may change the dtype of a sum.
        with torch.autocast(device_type=b.device.type, enabled=False):
            h, after = affine_scan_torch(a, b, initial, resets)
    else:
        a, b, initial = (x.contiguous() for x in (a, b, initial))
        h, after = affine_scan_native.affine_scan_native(a, b, initial, resets)
    return h.reshape(batch, sequence, *features), after.reshape(batch, *features)


def _check(a: Tensor, b: Tensor, state: Tensor | None, segment_ids: Tensor | None) -> torch.dtype:
    """The dtype of the sums, for arguments that agree."""
    if b.dim() < 2 or b.shape[1] == 0:
        raise ValueError(f"b has shape {list(b.shape)}; expected [batch, sequence, *features] with a token at least")
    shared = tuple(1 if i > 1 and n == 1 else m for i, (n, m) in enumerate(zip(a.shape, b.shape, strict=False)))
    if a.dim() != b.dim() or a.shape != shared:
        ones = ", or 1 in place of a feature dimension" if b.dim() > 2 else ""
        raise ValueError(f"a has shape {list(a.shape)}; expected that of b, {list(b.shape)}{ones}")
    for name, tokens in (("a", a), ("b", b)):
        check_dtype(name, tokens, TOKENS)
    check_device("a", a, b, "b")
    accumulate_dtype = sum_dtype(a, b)
    if state is not None:
        check_tensor("state", state, (b.shape[0], *b.shape[2:]), (accumulate_dtype,), b, "b")
    check_segment_ids(segment_ids, b, "b")
    return accumulate_dtype


def _choose(a: Tensor, b: Tensor, state: Tensor | None, backend: str) -> str:
    """``torch`` or ``native``."""
    check_backend_name(backend)
    if backend == "torch":
        return backend
    device = native.place(b.device)
    if backend == "auto":
        fits = b.device.type in native.KINDS and affine_scan_native.fits(device, a.dtype, b.dtype)
        return "native" if fits else "torch"
    for name, x in (("a", a), ("b", b), ("state", state)):
        if x is None:
            continue
        wrong = None
        if x.device.type != backend:
            wrong = f"a {backend} tensor"
        elif x.dtype not in affine_scan_native.DTYPES:
            wrong = "float32 or bfloat16"
        if wrong is not None:
            raise not_taken(backend, name, x, wrong)
    if (failure := affine_scan_native.why_not(device, a.dtype, b.dtype)) is not None:
        raise cannot_run(backend, failure)
    return "native"
