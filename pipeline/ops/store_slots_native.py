"""`store_slots` on the native kernel of kernels/store_slots: what it takes, and its check."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pipeline.ops import native
from pipeline.ops.checks import dtype_name
from pipeline.ops.slots import Slots, SlotsByChunk, shuffle
from pipeline.ops.store_slots_torch import store_slots_torch

OP = "store_slots"
DIM_MULTIPLE = 16
DTYPES = (torch.float32, torch.bfloat16)

# A wrong binary merges other keys. Those of the check are far enough apart that rounding does not.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def unsupported(k: Tensor, v: Tensor) -> tuple[str, str] | None:
    """The argument that `store_slots` accepts and the kernel does not, and what it expects; None where it takes all."""
    for name, x in (("k", k), ("v", v)):
        if x.device.type != "cpu":
            return name, "a cpu tensor"
        if x.dtype not in DTYPES:
            return name, "float32 or bfloat16"
    if k.shape[-1] == 0 or k.shape[-1] % DIM_MULTIPLE:
        return "k", f"a dim that is a multiple of {DIM_MULTIPLE}"
    return None


# Called while tracing, both answers are constants of the graph.
@torch.compiler.assume_constant_result
def fits(dtype: torch.dtype) -> bool:
    """Whether to use the kernel for tokens of a dtype. One that is built but fails its check is not used, with one
    warning."""
    return native.fits(_kernel(dtype))


@torch.compiler.assume_constant_result
def why_not(dtype: torch.dtype) -> str | None:
    """None where the kernel can be used. Loads the library and checks the kernel against PyTorch, each once."""
    return native.refusal(_kernel(dtype))


@functools.cache
def _kernel(dtype: torch.dtype) -> native.Kernel:
    return native.Kernel(OP, "cpu", dtype_name(dtype), _register, lambda: self_check(dtype), TOLERANCE[dtype])


def store_slots_native(
    slots: Slots, k: Tensor, v: Tensor, weights: Tensor, taken: Tensor, goes_on: Tensor, order: Tensor
) -> SlotsByChunk:
    """`store_slots` for arguments that the kernel takes."""
    batch, chunks, _, heads, dim = k.shape
    count = slots.keys.shape[2]
    after = Slots(*(x.clone(memory_format=torch.contiguous_format) for x in slots))
    keys = k.new_empty(batch, chunks, heads, count, dim)
    counts = after.counts.new_empty(batch, chunks, heads, count)
    found = (keys, torch.empty_like(keys), counts, torch.empty_like(counts))
    tokens = (x.contiguous() for x in (k, v, weights, taken, goes_on))
    torch.ops.mnemos.store_slots.default(*tokens, order, *after, *found)
    return SlotsByChunk(*found, after)


@functools.cache
def _register() -> None:
    torch.library.register_fake(f"mnemos::{OP}", _fake)


def _fake(*arguments: Tensor) -> None:
    """Nothing is returned, and what is written has its shape."""


def self_check(dtype: torch.dtype) -> float:
    """The largest relative RMSE of a result against the PyTorch path in float64: slots that begin empty, are full, and
    are emptied in one of two rows."""
    rng = torch.Generator("cpu").manual_seed(0)
    batch, chunks, tokens, heads, dim, count = 2, 5, 8, 2, 32, 24
    size = (batch, chunks, tokens, heads, dim)
    k, v = (torch.randn(size, generator=rng, dtype=torch.float64, device="cpu").to(dtype) for _ in range(2))
    taken = torch.rand(size[:3], generator=rng, device="cpu") < 0.9
    goes_on = torch.ones(size[:2], dtype=torch.bool, device="cpu")
    goes_on[1, 2] = False
    order = torch.tensor(shuffle(count + tokens), device="cpu")
    weights = torch.rand(size[:4], generator=rng, device="cpu") + 0.5
    wanted = store_slots_torch(
        Slots.empty(batch, heads, count, dim, k.double()),
        k.double(),
        v.double(),
        weights.double(),
        taken,
        goes_on,
        order,
    )
    found = store_slots_native(Slots.empty(batch, heads, count, dim, k), k, v, weights, taken, goes_on, order)
    pairs = zip((*found[:4], *found.after), (*wanted[:4], *wanted.after), strict=True)
    errors = [float((x.double() - y).norm() / y.norm()) for x, y in pairs]
    return math.nan if any(map(math.isnan, errors)) else max(errors)
