"""Inputs of the memory op, and what its tests compare; the truth is the float64 token loop."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import miras_scan, native
from tests.ops.reference import token_loop

TIGHT = 1e-10
NAMES = ("q", "k", "v", "alpha", "eta", "theta", "M0", "S0")
OUTPUTS = ("y", "M", "S")
BACKENDS = ["torch", *filter(native.load, native.KINDS)]


def make(
    batch: int = 2,
    sequence: int = 65,
    heads: int = 2,
    key_dim: int = 8,
    value_dim: int = 6,
    *,
    seed: int = 0,
    gates: str = "any",
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """q, k, v, alpha, eta, theta, M, S as leaves. Gates: ``any`` in [0, 1], its ends included, or the ``model``'s."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def uniform() -> Tensor:
        return torch.rand(batch, sequence, heads, generator=rng, dtype=torch.float64)

    q, k = (F.normalize(normal(batch, sequence, heads, key_dim), dim=-1) for _ in range(2))
    v = normal(batch, sequence, heads, value_dim)
    if gates == "any":
        # One in eight is exactly 0, and one in eight exactly 1.
        ends = [(uniform() * 8).floor() for _ in range(3)]
        alpha, eta, theta = uniform() / 10, uniform(), uniform()
        alpha, eta, theta = (
            torch.where(end == 0, 0.0, torch.where(end == 1, 1.0, gate))
            for end, gate in zip(ends, (alpha, eta, theta), strict=True)
        )
    else:
        alpha, eta = uniform() * 0.01, uniform()[:, :1].expand(batch, sequence, heads) * 0.9
        theta = 0.9 * uniform() * (1 - eta) ** 2
    state = [normal(batch, heads, key_dim, value_dim) for _ in range(2)]
    return [x.to(dtype).clone().requires_grad_() for x in (q, k, v, alpha, eta, theta, *state)]


def segments(batch: int, sequence: int, starts: Sequence[int]) -> Tensor:
    """Ids that come back (0, 1, 0, ...): a segment is a run of equal ids, not an id."""
    change = torch.zeros(batch, sequence, dtype=torch.int64)
    change[:, list(starts)] = 1
    return change.cumsum(dim=1) % 2


def swapped(x: Tensor) -> Tensor:
    """The same numbers with the strides of a tensor whose first two dimensions are swapped."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def run(x: Sequence[Tensor], **options) -> list[Tensor]:
    y, state = miras_scan(*x[:6], state=(x[6], x[7]), **options)
    return [y, *state]


def truth(x: Sequence[Tensor], segment_ids: Tensor | None = None) -> list[Tensor]:
    y, state = token_loop(*x[:6], state=(x[6], x[7]), segment_ids=segment_ids)
    return [y, *state]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients under one random cotangent for y and the final state."""
    rng = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(z.shape, generator=rng, dtype=torch.float64).to(z.dtype) for z in outputs]
    return list(torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True))


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str], tolerance: float) -> None:
    for name, a, b in zip(names, actual, expected, strict=True):
        assert a.shape == b.shape
        if not b.any():
            assert not a.any(), name
        else:
            assert error(a, b) <= tolerance, f"{name}: {error(a, b):.2e}"


def assert_same_op(x: Sequence[Tensor], tolerance: float = TIGHT, segment_ids: Tensor | None = None, **options) -> None:
    actual, expected = run(x, segment_ids=segment_ids, **options), truth(x, segment_ids)
    assert_close(actual, expected, ("y", "M", "S"), tolerance)
    assert_close(gradients(actual, x), gradients(expected, x), NAMES, tolerance)


def place(x: Sequence[Tensor], backend: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Inputs on the backend's device as leaves: tokens in a dtype, gates and state in float32."""
    device = "cuda" if backend == "cuda" else "cpu"
    moved = [z.detach().to(device, dtype if i < 3 else torch.float32) for i, z in enumerate(x)]
    return [z.requires_grad_() for z in moved]


def assert_backend_is_the_loop(
    x: Sequence[Tensor], backend: str, tolerance: float, segment_ids: Tensor | None = None
) -> None:
    ids = None if segment_ids is None else segment_ids.to(x[0].device)
    actual, expected = run(x, segment_ids=ids, backend=backend), truth(x, ids)
    assert [z.dtype for z in actual] == [x[0].dtype, torch.float32, torch.float32]
    assert_close(actual, expected, ("y", "M", "S"), tolerance)
    # The same cotangents for both, as they are rounded.
    rng = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(z.shape, generator=rng).to(z) for z in actual]
    got = torch.autograd.grad(actual, x, cotangents)
    assert [(z.dtype, z.shape) for z in got] == [(z.dtype, z.shape) for z in x]
    wanted = torch.autograd.grad(expected, x, [z.double() for z in cotangents], materialize_grads=True)
    assert_close(got, wanted, NAMES, tolerance)
