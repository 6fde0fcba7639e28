"""What the native affine scan needs from Python: shapes, gradients, and a check before its first use.

The sources are in kernels/affine_scan, whose README says what the two ops compute.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from pipeline.ops import native
from pipeline.ops.affine_scan_torch import affine_scan_torch
from pipeline.ops.checks import dtype_name
from pipeline.ops.constants import constant_result

# Tokens between the states that the forward pass saves. The backward pass recomputes those in between, on a GPU in
# registers: h itself, when it is bfloat16, is too coarse for the gradient of a.
INTERVAL = 16

OP = "affine_scan"

DTYPES = (torch.float32, torch.bfloat16)


@constant_result
def fits(device: str, a: torch.dtype, b: torch.dtype) -> bool:
    """Whether to use the kernel for a and b of these dtypes on a device, ``cpu`` or ``cuda:INDEX``.

    One that is built but fails its check is not used, with one warning.
    """
    return {a, b} <= set(DTYPES) and native.fits(_kernel(device, a, b))


@constant_result
def why_not(device: str, a: torch.dtype, b: torch.dtype) -> str | None:
    """None where the kernel can be used. Loads the library and checks the kernel against PyTorch, each once."""
    return native.refusal(_kernel(device, a, b))


def _kernel(device: str, a: torch.dtype, b: torch.dtype) -> native.Kernel:
    names = [dtype_name(x) for x in (a, b)]
    case = names[0] if a == b else f"a {names[0]}, b {names[1]}"
    tolerance = 1e-2 if torch.bfloat16 in (a, b) else 1e-5
    return native.Kernel(OP, device, case, _register, functools.partial(_largest_error, device, a, b), tolerance)


def affine_scan_native(a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """``affine_scan`` for contiguous arguments, of a device and dtypes for which `why_not` is None.

    a, b ``[batch, sequence, features]``, state ``[batch, features]``, resets ``[batch, sequence]`` bool.
    """
    learns = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad or state.requires_grad)
    h, after, _ = torch.ops.mnemos.affine_scan(a, b, state, resets, INTERVAL, learns)
    return h, after


@functools.cache
def _register() -> None:
    torch.library.register_fake("mnemos::affine_scan", _fake)
    torch.library.register_fake("mnemos::affine_scan_backward", _fake_backward)
    torch.library.register_autograd("mnemos::affine_scan", _backward, setup_context=_setup)
    torch.library.register_autograd("mnemos::affine_scan_backward", _backward_twice)


def _fake(
    a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None, interval: int, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, sequence, features = b.shape
    saved = [batch, (sequence + interval - 1) // interval, features] if save else [0]
    return torch.empty_like(b), torch.empty_like(state), state.new_empty(saved)


def _fake_backward(
    grad_h: Tensor, grad_after: Tensor, a: Tensor, b: Tensor, resets: Tensor | None, states: Tensor, interval: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(b), torch.empty_like(grad_after)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    a, b, _, resets, interval, save = inputs
    states = output[2]
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(a, b, resets, states)
    ctx.interval, ctx.saved = interval, save


def _backward(ctx: Any, grad_h: Tensor, grad_after: Tensor, _: Tensor | None) -> tuple:
    if not ctx.saved:
        raise RuntimeError("mnemos::affine_scan ran with save=False, which leaves nothing for a backward pass")
    a, b, resets, states = ctx.saved_tensors
    gradients = torch.ops.mnemos.affine_scan_backward(
        grad_h.contiguous(), grad_after.contiguous(), a, b, resets, states, ctx.interval
    )
    return *gradients, None, None, None


def _backward_twice(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("affine_scan is differentiable once; its backward pass has no gradient")


# Batch, sequence, features: one that the kernels split in time, one that they also do in pairs of features, and one of
# full vectors and a ragged end.
_SHAPES = ((1, 2100, 3), (2, 200, 66), (2, 41, 66))


def _largest_error(device: str, a_dtype: torch.dtype, b_dtype: torch.dtype) -> float:
    """The largest relative RMSE of a result, gradients included, between the kernel and PyTorch on the CPU.

    On a GPU the PyTorch path would be thousands of launches.
    """
    rng = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float32, device="cpu")

    errors = []
    for batch, sequence, features in _SHAPES:
        shape = (batch, sequence, features)
        a, b, state = torch.tanh(normal(*shape)).to(a_dtype), normal(*shape).to(b_dtype), normal(batch, features)
        resets = normal(batch, sequence) > 2.5
        cotangents = [normal(*shape).to(b_dtype), normal(batch, features)]
        results = []
        for path, where in ((affine_scan_native, device), (affine_scan_torch, "cpu")):
            inputs = tuple(x.detach().to(where).requires_grad_() for x in (a, b, state))
            with torch.enable_grad():
                outputs = path(inputs[0], inputs[1], inputs[2], resets.to(where))
            gradients = torch.autograd.grad(outputs, inputs, [x.to(where) for x in cotangents])
            results.append([x.detach().cpu().double() for x in (*outputs, *gradients)])
        for x, y in zip(*results, strict=True):
            errors.append(float((x - y).norm() / y.norm()))
    return math.nan if any(map(math.isnan, errors)) else max(errors)
