"""The CUDA tile program, mirrored in PyTorch, keeps the accuracy that is asked of every backend at larger sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.miras_scan_tiles import Tiles, round_tf32, split, unit_lower_inverse
from tests.ops.scan_cases import NAMES, assert_close, gradients, make, segments, truth

ALL = ("y", "M", "S", *NAMES)


def inputs(dtype: torch.dtype, tokens: int, dim: int, value_dim: int, keys: str) -> list[Tensor]:
    x = [z.detach() for z in make(1, tokens, 2, dim, value_dim, gates="model", dtype=torch.float32)]
    if keys == "repeated":
        rng = torch.Generator().manual_seed(2)
        pool = F.normalize(torch.randn(4, dim, generator=rng), dim=-1)
        x[1] = pool[torch.randint(4, (1, tokens, 2), generator=rng)]
    return [z.to(dtype).requires_grad_() for z in x[:3]] + [z.requires_grad_() for z in x[3:]]


def check(x: list[Tensor], ids: Tensor | None, tolerance: float) -> None:
    expected = truth(x, ids)
    rng = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(z.shape, generator=rng, dtype=torch.float64) for z in expected]
    cotangents = [z.to(like.dtype) for z, like in zip(cotangents, (x[2], x[6], x[7]), strict=True)]
    grads = torch.autograd.grad(expected, x, [z.double() for z in cotangents])
    tiles = Tiles(*(z.detach() for z in x), None if ids is None else F.pad(ids[:, 1:] != ids[:, :-1], (1, 0)))
    actual = [*tiles.forward(), *tiles.backward(*cotangents)]
    assert_close(actual, [*expected, *grads], ALL, tolerance)


ACCURACY = [
    (torch.float32, "random", 1e-5),
    (torch.float32, "repeated", 1e-5),
    (torch.bfloat16, "random", 1e-2),
    (torch.bfloat16, "repeated", 3e-2),
]


@pytest.mark.parametrize(("dtype", "keys", "tolerance"), ACCURACY)
@pytest.mark.parametrize(("tokens", "dim"), [(63, 32), (1000, 128)])
def test_accuracy(tokens: int, dim: int, dtype: torch.dtype, keys: str, tolerance: float) -> None:
    check(inputs(dtype, tokens, dim, 32, keys), None, tolerance)


@pytest.mark.parametrize(("dtype", "keys", "tolerance"), [ACCURACY[0], ACCURACY[3]])
def test_accuracy_does_not_wear_off_with_length(dtype: torch.dtype, keys: str, tolerance: float) -> None:
    check(inputs(dtype, 4096, 32, 16, keys), None, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy_with_segments(dtype: torch.dtype) -> None:
    ids = segments(1, 500, (1, 63, 64, 200, 320))
    check(inputs(dtype, 500, 64, 48, "random"), ids, 1e-5 if dtype == torch.float32 else 1e-2)


def test_gradients_of_the_mirror_are_those_of_the_rule_where_gates_end() -> None:
    x = [z.detach().float().requires_grad_() for z in make(2, 130, 2, 16, 16, gates="any")]
    expected = truth(x)
    tiles = Tiles(*(z.detach() for z in x), None)
    assert_close(tiles.forward(), expected, ("y", "M", "S"), 1e-5)
    rng = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(z.shape, generator=rng, dtype=torch.float64).float() for z in expected]
    assert_close(tiles.backward(*cotangents), gradients(expected, x), NAMES, 1e-5)


def test_the_inverse_by_blocks() -> None:
    rng = torch.Generator().manual_seed(0)
    lower = torch.tril(torch.randn(3, 64, 64, generator=rng) / 8, -1)
    expected = torch.linalg.inv((torch.eye(64) + lower).double())
    assert (unit_lower_inverse(lower) - expected).norm() <= 1e-6 * expected.norm()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30))
def test_roundings(value: float) -> None:
    x = torch.tensor([value])
    rounded = round_tf32(x)
    assert (rounded.view(torch.int32) & 0x1FFF).item() == 0
    assert abs(rounded.item() - value) <= 2**-11 * abs(value)
    high, low = split(x)
    assert abs((high.double() + low.double()).item() - x.double().item()) <= 2**-16 * abs(value)
