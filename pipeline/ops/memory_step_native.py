"""One token of the memory op on the native kernels of kernels/memory_step: what they take, and their check."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import native
from pipeline.ops.checks import dtype_name
from pipeline.ops.memory_step_torch import memory_step_torch

OP = "memory_step"
KEY_DIMS = (32, 64, 128)
VALUE_MULTIPLE = 16
DTYPES = (torch.float32, torch.bfloat16)

# Ten times what is asked of the kernels, and far below what a wrong binary makes of the numbers.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def unsupported(backend: str, tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The argument that `memory_step` accepts and the kernels do not, and what they expect; None where they take all.

    ``tensors`` are the arguments by name, without those that are None. Their shapes fit each other.
    """
    q, v = tensors["q"], tensors["v"]
    if q.device.type != backend:
        return "q", f"a {backend} tensor"
    dtype = q.dtype
    for name, tensor in tensors.items():
        if name in ("q", "k", "v", "out"):
            if tensor.dtype not in DTYPES:
                return name, "float32 or bfloat16"
            if tensor.dtype != dtype:
                return name, f"the dtype of q, {dtype_name(dtype)}"
        elif tensor.dtype != torch.float32:
            return name, "float32"
        # What is written in place cannot be a copy.
        if name in ("memory", "momentum", "out") and not tensor.is_contiguous():
            return name, "a contiguous tensor"
    if q.shape[-1] not in KEY_DIMS:
        return "q", "a key dim of 32, 64 or 128"
    if v.shape[-1] % VALUE_MULTIPLE:
        return "v", f"a value dim that is a multiple of {VALUE_MULTIPLE}"
    return None


# Called while tracing, both answers are constants of the graph.
@torch.compiler.assume_constant_result
def fits(device: str, dtype: torch.dtype, key_dim: int) -> bool:
    """Whether to use the kernel for tokens of a dtype and key dim on a device, ``cpu`` or ``cuda:INDEX``.

    One that is built but fails its check is not used, with one warning.
    """
    return native.fits(_kernel(device, dtype, key_dim))


@torch.compiler.assume_constant_result
def why_not(device: str, dtype: torch.dtype, key_dim: int) -> str | None:
    """None where the kernel can be used. Loads the library and checks the kernel against PyTorch, each once."""
    return native.refusal(_kernel(device, dtype, key_dim))


def ready(device: torch.device, dtype: torch.dtype, key_dim: int) -> bool:
    """Whether the kernel has been used in this process before, and may be used."""
    return dtype in DTYPES and native.passed(_kernel_on(device, dtype, key_dim))


@functools.cache
def _kernel_on(device: torch.device, dtype: torch.dtype, key_dim: int) -> native.Kernel:
    return _kernel(native.place(device), dtype, key_dim)


@functools.cache
def _kernel(device: str, dtype: torch.dtype, key_dim: int) -> native.Kernel:
    case = f"{dtype_name(dtype)}, key dim {key_dim}"
    # Not bound now: a test may put another one in its place.
    return native.Kernel(OP, device, case, _register, lambda: self_check(device, dtype, key_dim), TOLERANCE[dtype])


def memory_step_native(
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
    """``memory_step`` for arguments that the kernels take, into ``out``. Tokens and gates may be strided, of which the
    kernels get copies."""
    torch.ops.mnemos.memory_step.default(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        alpha.contiguous(),
        None if eta is None else eta.contiguous(),
        theta.contiguous(),
        memory,
        momentum,
        out,
    )


@functools.cache
def _register() -> None:
    torch.library.register_fake(f"mnemos::{OP}", _fake)


def _fake(*arguments: Tensor | None) -> None:
    """Nothing is returned, and what is written has its shape."""


def self_check(device: str, dtype: torch.dtype, key_dim: int) -> float:
    """The largest relative RMSE of a read or a state against the PyTorch path in float64 on the CPU, with momentum and
    without; value dims with whole blocks of columns and without."""
    rng = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64, device="cpu")

    errors = []
    for value_dim, has_momentum in ((key_dim, True), (112, True), (key_dim, False)):
        size = (2, 3)
        q, k = (F.normalize(normal(*size, key_dim), dim=-1).to(dtype) for _ in range(2))
        v = normal(*size, value_dim).to(dtype)
        alpha, eta, theta = (largest * torch.rand(size, generator=rng, device="cpu") for largest in (0.01, 0.9, 0.9))
        states = [normal(*size, key_dim, value_dim).float() for _ in range(2)]
        gates = [alpha, eta if has_momentum else None, theta]

        expected = [x.double() for x in states]
        wide = [None if x is None else x.double() for x in gates]
        y = torch.empty(v.shape, dtype=torch.float64, device="cpu")
        memory_step_torch(q.double(), k.double(), v.double(), wide[0], wide[1], wide[2], *expected, y)  # type: ignore[arg-type]

        actual = [x.to(device) for x in states]
        there = [None if x is None else x.to(device) for x in gates]
        out = torch.empty(v.shape, dtype=dtype, device=device)
        memory_step_native(*(x.to(device) for x in (q, k, v)), *there, *actual, out)  # type: ignore[arg-type]
        for found, wanted in zip((out, *actual), (y, *expected), strict=True):
            errors.append(float((found.cpu().double() - wanted).norm() / wanted.norm()))
    return math.nan if any(map(math.isnan, errors)) else max(errors)
