"""Tokens in float16: what has no kernel for it computes in float32, and returns float16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.ops.affine_scan import affine_scan
from pipeline.ops.attention import choose_attention
from pipeline.ops.cross_entropy import linear_cross_entropy
from pipeline.ops.dual_scan import dual_scan
from pipeline.ops.mlp_scan import mlp_scan
from pipeline.ops.scan import miras_scan

BATCH, TOKENS, HEADS, DIM = 1, 24, 2, 32
Op = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens() -> tuple[list[Tensor], list[Tensor]]:
    """q, k and v in float16, and gates."""
    shape = (BATCH, TOKENS, HEADS, DIM)
    unit = [torch.nn.functional.normalize(random(*shape, seed=seed), dim=-1) for seed in range(2)]
    alpha, eta, theta = (torch.full((BATCH, TOKENS, HEADS), gate) for gate in (0.01, 0.1, 0.5))
    return [x.half() for x in (*unit, random(*shape, seed=2))], [alpha, eta, theta]


def deep(*inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return mlp_scan(*inputs, (0.1 * random(HEADS, 8, DIM, seed=3), 0.1 * random(HEADS, 8, DIM, seed=4)))


OPS: dict[str, Op] = {
    "auto": miras_scan,
    "torch": lambda *inputs: miras_scan(*inputs, backend="torch"),
    "dual": dual_scan,
    "mlp": deep,
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_a_scan_computes_in_float32(op: Op) -> None:
    halves, gates = tokens()
    half, single = ([x.detach().to(dtype).requires_grad_() for x in halves] for dtype in (torch.float16, torch.float32))
    found, state = op(*half, *gates)
    expected, true_state = op(*single, *gates)
    assert found.dtype == torch.float16 and all(part.dtype == torch.float32 for part in state)
    assert torch.equal(found, expected.half())
    assert all(torch.equal(*pair) for pair in zip(state, true_state, strict=True))
    cotangent = random(*found.shape, seed=5).half()
    for a, b in zip(
        torch.autograd.grad(found, half, cotangent),
        torch.autograd.grad(expected, single, cotangent.float()),
        strict=True,
    ):
        assert a.dtype == torch.float16
        torch.testing.assert_close(a.float(), b, rtol=1e-3, atol=1e-4)


def test_a_kernel_that_is_asked_for_by_name_refuses_float16() -> None:
    halves, gates = tokens()
    with pytest.raises(ValueError, match=r"q is float16 .*: use 'auto' or 'torch'"):
        miras_scan(*halves, *gates, backend="cpu")


def test_the_elementwise_scan_computes_in_float32() -> None:
    a, b = torch.sigmoid(random(2, 40, 5, seed=0)).half(), random(2, 40, 5, seed=1).half()
    found, state = affine_scan(a, b)
    expected, true_state = affine_scan(a.float(), b.float(), backend="torch")
    assert found.dtype == torch.float16 and torch.equal(found, expected.half()) and torch.equal(state, true_state)


@pytest.mark.parametrize("scale", [1e5, 1e-6])
def test_the_loss_takes_a_scale_that_float16_does_not_hold(scale: float) -> None:
    hidden, weight = (0.05 * random(6, 8, seed=0)).half(), (0.01 * random(29, 8, seed=1)).half()
    labels = torch.arange(6)
    gradients = []
    for dtype in (torch.float16, torch.float64):
        h, w = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
        losses = linear_cross_entropy(h, w, labels)
        assert losses.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        gradients.append(torch.autograd.grad(losses.sum() * scale, (h, w)))
    for found, expected in zip(*gradients, strict=True):
        assert found.dtype == torch.float16
        # What is below the least float16 is lost; the loss scale is there for it.
        torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=max(1e-7, 5e-4 * scale))


def test_attention_runs_in_float16_on_every_device() -> None:
    assert choose_attention("window", 4, "cpu", torch.float16, 32) == "sdpa"
    assert choose_attention("window", 4, "cuda", torch.float16, 32) == "flex"
