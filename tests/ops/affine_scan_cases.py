"""Inputs of the affine scan, and what its tests compare; the truth is the float64 loop over tokens."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.ops.affine_scan import affine_scan
from tests.ops.affine_scan_reference import affine_loop

BACKENDS = ("torch", "cpu")
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("h", "after", "grad a", "grad b", "grad state")
# Relative RMSE, by the dtype of the result.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3e-3}


def make(
    *shape: int,
    a: torch.dtype = torch.float64,
    b: torch.dtype | None = None,
    seed: int = 0,
    factor: Callable[[Tensor], Tensor] = torch.tanh,
) -> list[Tensor]:
    """a, b and the state as leaves; one factor in eight is exactly 0, one exactly 1."""
    b = a if b is None else b
    rng = torch.Generator().manual_seed(seed)
    normal = [torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2)]
    factors = factor(2 * normal[0])
    ends = (torch.rand(shape, generator=rng) * 8).floor()
    factors = torch.where(ends == 0, 0.0, torch.where(ends == 1, 1.0, factors))
    wide = torch.float64 if torch.float64 in (a, b) else torch.float32
    state = torch.randn(shape[0], *shape[2:], generator=rng, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x, dtype in ((factors, a), (normal[1], b), (state, wide))]


def results(x: Sequence[Tensor], *, seed: int = 1, **options) -> list[Tensor]:
    """h, after, and the gradients of a, b and the state under a random cotangent."""
    outputs = affine_scan(x[0], x[1], state=x[2], **options)
    return [*outputs, *torch.autograd.grad(outputs, x, cotangents(x, seed))]


def cotangents(x: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(z.shape, generator=rng, dtype=torch.float64).to(z.dtype) for z in (x[1], x[2])]


def truth(x: Sequence[Tensor], segment_ids: Tensor | None = None) -> list[Tensor]:
    """The loop and its gradients by autograd, in float64."""
    leaves = [z.detach().double().requires_grad_() for z in x]
    outputs = affine_loop(leaves[0], leaves[1], state=leaves[2], segment_ids=segment_ids)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [z.double() for z in cotangents(x)])]


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def assert_close(
    actual: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str] = NAMES, *, scale: float = 1.0
) -> None:
    for name, x, y in zip(names, actual, expected, strict=True):
        assert x.shape == y.shape
        if not y.any():
            assert not x.any(), name
        else:
            assert error(x, y) <= scale * TOLERANCE[x.dtype], f"{name}: {error(x, y):.2e}"


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def segments(batch: int, sequence: int, change: float | None, seed: int = 0) -> Tensor | None:
    if change is None:
        return None
    rng = torch.Generator().manual_seed(seed)
    # Ids that come back: a segment is a run of equal ids, not an id.
    return (torch.rand(batch, sequence, generator=rng) < change).int().cumsum(dim=1) % 2
