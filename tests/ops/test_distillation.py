"""Divergences and gradients of the tiled head are those of float64, without a sequence's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.ops import cross_entropy
from pipeline.ops.distillation import linear_kl

TOKENS, WIDTH, VOCABULARY = 37, 8, 29


def make(dtype: torch.dtype = torch.float64, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, teacher and weight."""
    rng = torch.Generator().manual_seed(0)
    hidden, teacher = (
        (spread * torch.randn(TOKENS, WIDTH, generator=rng, dtype=torch.float64)).to(dtype) for _ in range(2)
    )
    weight = torch.randn(VOCABULARY, WIDTH, generator=rng, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), teacher, weight


def truth(hidden: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """By torch's own kl_div, of whole logits in float64."""
    student, expected = (F.log_softmax(x.double() @ weight.double().T, dim=-1) for x in (hidden, teacher))
    return F.kl_div(student, expected, reduction="none", log_target=True).sum(-1)


def assert_equal_to_truth(hidden: Tensor, teacher: Tensor, weight: Tensor, upstream: Tensor, tolerance: float) -> None:
    found, expected = linear_kl(hidden, teacher, weight), truth(hidden, teacher, weight)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(found, hidden, upstream.to(found.dtype))
    (reference,) = torch.autograd.grad(expected, hidden, upstream)
    assert gradient.dtype == hidden.dtype
    error = float((gradient.double() - reference.double()).norm() / reference.double().norm())
    assert error <= tolerance


@pytest.mark.parametrize("tile", [None, 1, 3, 36, 37])
def test_values_and_gradients_whatever_the_tile_and_the_weights_of_tokens(
    tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tile is not None:
        monkeypatch.setattr(cross_entropy, "LOGIT_BYTES", 8 * VOCABULARY * tile)
    weights = torch.randn(TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for upstream in (torch.ones_like(weights), weights):
        assert_equal_to_truth(*make(), upstream=upstream, tolerance=1e-12)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str
)
def test_lower_precisions_agree_with_float64(dtype: torch.dtype, tolerance: float) -> None:
    assert_equal_to_truth(*make(dtype), upstream=torch.ones(TOKENS, dtype=torch.float64), tolerance=tolerance)


def test_a_loss_scale_is_not_lost_in_float16() -> None:
    """Times 2^20 a gradient that the mean over many tokens divides is in float16's range again."""
    hidden, teacher, weight = make(torch.float16)
    scale = 2.0**20 / 1e7
    (gradient,) = torch.autograd.grad(linear_kl(hidden, teacher, weight).sum() * scale, hidden)
    (expected,) = torch.autograd.grad(truth(hidden, teacher, weight).sum() * scale, hidden)
    torch.testing.assert_close(gradient.double(), expected.double(), rtol=1e-2, atol=1e-3)


def test_equal_inputs_diverge_by_nothing_and_certain_ones_stay_finite() -> None:
    hidden, _, weight = make()
    found = linear_kl(hidden, hidden.detach().clone(), weight)
    assert not found.any()
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    assert not gradient.any()
    hidden, teacher, weight = make(torch.float32, spread=300.0)
    assert linear_kl(hidden, teacher, weight).isfinite().all()


def test_no_token_gives_no_divergence_and_a_gradient_of_nothing() -> None:
    hidden, teacher, weight = make()
    found = linear_kl(hidden[:0], teacher[:0], weight)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    assert found.shape == (0,) and gradient.shape == hidden.shape and not gradient.any()


class Largest(TorchDispatchMode):
    """The most numbers that any tensor has."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def test_neither_pass_holds_the_logits_of_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = 4
    monkeypatch.setattr(cross_entropy, "LOGIT_BYTES", 8 * VOCABULARY * tile)
    hidden, teacher, weight = make()
    with Largest() as largest:
        linear_kl(hidden, teacher, weight).sum().backward()
    assert largest.numbers <= max(TOKENS * WIDTH, VOCABULARY * tile) < TOKENS * VOCABULARY


def test_a_teacher_or_head_that_would_learn_is_refused() -> None:
    hidden, teacher, weight = make()
    for teacher_learns, weight_learns in ((True, False), (False, True)):
        arguments = teacher.clone().requires_grad_(teacher_learns), weight.clone().requires_grad_(weight_learns)
        with pytest.raises(ValueError, match="linear_kl: the teacher and the head are constants"):
            linear_kl(hidden, *arguments)
