"""Losses and gradients of the tiled head are those of float64 cross-entropy, without a sequence's logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.ops import cross_entropy
from pipeline.ops.cross_entropy import (
    linear_argmax,
    linear_cross_entropy,
    linear_cross_entropy_z,
    softmax_and_gradient,
)

IGNORED = -100


def make(
    tokens: int = 37, width: int = 8, vocabulary: int = 29, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and labels, a quarter of which are ignored."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=rng)
    labels[torch.rand(tokens, generator=rng) < 0.25] = IGNORED
    return hidden, weight, labels


def truth(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden.double() @ weight.double().T
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


def assert_equal_to_truth(hidden: Tensor, weight: Tensor, labels: Tensor, scale: float, tolerance: float) -> None:
    losses, expected = linear_cross_entropy(hidden, weight, labels), truth(hidden, weight, labels)
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    actual = torch.autograd.grad(losses.sum() * scale, (hidden, weight))
    for gradient, reference in zip(actual, torch.autograd.grad(expected.sum() * scale, (hidden, weight)), strict=True):
        assert gradient.dtype == reference.dtype
        error = float((gradient.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30))
        assert error <= tolerance


@pytest.fixture(params=[None, 1, 3, 36, 37], ids="whole one-token three-tokens all-but-one exact".split())
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Tokens whose logits exist at a time, out of 37 with a vocabulary of 29."""
    if request.param is not None:
        monkeypatch.setattr(cross_entropy, "LOGIT_BYTES", 4 * 29 * request.param)
    return request.param


@pytest.mark.parametrize("scale", [1.0, -0.37])
def test_losses_and_gradients_whatever_the_tile(tile: int | None, scale: float) -> None:
    assert_equal_to_truth(*make(), scale=scale, tolerance=1e-12)


def test_an_evaluation_makes_no_gradients_and_no_logits_of_a_tile_without_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cross_entropy, "LOGIT_BYTES", 4 * 29 * 10)
    hidden, weight, labels = make()
    labels[:20] = IGNORED
    labels[25] = 3
    products = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: products.append(len(x)) or linear(x, *rest))
    monkeypatch.setattr(cross_entropy, "_losses_and_gradient", None)
    with torch.no_grad():
        losses, penalties = linear_cross_entropy_z(hidden, weight, labels, 0.1)
    assert products == [10, 7]
    torch.testing.assert_close(losses, truth(hidden, weight, labels).detach())
    assert not penalties[:20].any() and bool(penalties[25])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 12), st.integers(1, 25), st.integers(0, 1000))
def test_losses_and_gradients_of_any_shape(tokens: int, width: int, vocabulary: int, tile: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "LOGIT_BYTES", 4 * vocabulary * tile)
        assert_equal_to_truth(*make(tokens, width, vocabulary, seed), scale=2.0, tolerance=1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precisions(dtype: torch.dtype, tolerance: float, tile: int | None) -> None:
    hidden, weight, labels = make(dtype=dtype)
    assert linear_cross_entropy(hidden, weight, labels).dtype == torch.float32
    assert_equal_to_truth(hidden, weight, labels, scale=1.0, tolerance=tolerance)


@pytest.mark.parametrize("cached", [1, 4 * 29 * 5])
def test_losses_and_gradients_whatever_a_cache_holds(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CACHED_BYTES", cached)
    assert_equal_to_truth(*make(), scale=1.0, tolerance=1e-12)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_the_form_for_a_gpu_is_the_same_function(
    dtype: torch.dtype, tolerance: float, tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_losses_and_gradient", softmax_and_gradient)
    assert_equal_to_truth(*make(dtype=dtype), scale=1.0, tolerance=tolerance)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_form_for_a_gpu_is_one_graph_and_does_not_overflow(compiled: bool) -> None:
    function = (
        torch.compile(softmax_and_gradient, backend="eager", fullgraph=True) if compiled else softmax_and_gradient
    )
    logits, labels = torch.tensor([[3e4, 0.0, -3e4], [1e4, 1e4, 0.0]]), torch.tensor([1, IGNORED])
    losses, z_losses, gradient = function(logits, labels, IGNORED)
    assert z_losses is None
    assert losses.tolist() == [3e4, 0.0]
    assert gradient.tolist() == [[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]


def test_an_ignored_label_has_no_loss_and_no_gradient() -> None:
    hidden, weight, labels = make()
    losses = linear_cross_entropy(hidden, weight, labels)
    losses.sum().backward()
    ignored = labels == IGNORED
    assert ignored.any() and losses[ignored].eq(0).all() and losses[~ignored].gt(0).all()
    assert hidden.grad[ignored].eq(0).all() and hidden.grad[~ignored].ne(0).all()


def test_nothing_counted_gives_zeros() -> None:
    hidden, weight, labels = make()
    losses = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED))
    losses.sum().backward()
    assert not losses.any() and not hidden.grad.any() and not weight.grad.any()


def test_another_ignored_label() -> None:
    hidden, weight, labels = make()
    other = torch.where(labels == IGNORED, -1, labels)
    assert torch.equal(linear_cross_entropy(hidden, weight, other, -1), linear_cross_entropy(hidden, weight, labels))


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = make(dtype=torch.float32)
    losses = linear_cross_entropy(1e4 * hidden, weight, labels)
    torch.testing.assert_close(losses.double(), truth(1e4 * hidden, weight, labels), rtol=1e-4, atol=1e-1)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_what_is_trained_gets_a_gradient(needs: tuple[bool, bool]) -> None:
    hidden, weight, labels = make()
    whole = torch.autograd.grad(truth(hidden, weight, labels).sum(), (hidden, weight))
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip((hidden, weight), needs, strict=True)]
    loss = linear_cross_entropy(*leaves, labels).sum()
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    for leaf, need, expected in zip(leaves, needs, whole, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, expected)


def test_gradients_are_added_up_over_micro_batches() -> None:
    hidden, weight, labels = make()
    for rows in (slice(0, 10), slice(10, 37)):
        linear_cross_entropy(hidden[rows], weight, labels[rows]).sum().backward()
    expected = torch.autograd.grad(truth(hidden, weight, labels).sum(), (hidden, weight))
    torch.testing.assert_close((hidden.grad, weight.grad), expected)


@pytest.mark.parametrize("place", [0, 1, 36])
def test_weights_per_token_are_refused(place: int) -> None:
    hidden, weight, labels = make()
    weights = torch.ones(37, dtype=torch.float64)
    weights[place] = 2.0
    with pytest.raises(ValueError, match="differs between tokens"):
        (linear_cross_entropy(hidden, weight, labels) * weights).sum().backward()


def test_equal_weights_are_a_scale() -> None:
    hidden, weight, labels = make()
    linear_cross_entropy(hidden, weight, labels).backward(torch.full((37,), 0.5, dtype=torch.float64))
    expected = torch.autograd.grad(0.5 * truth(hidden, weight, labels).sum(), (hidden, weight))
    torch.testing.assert_close((hidden.grad, weight.grad), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (6, 5)])
def test_a_scale_that_is_nan_spoils_the_gradients_and_raises_nothing(shape: tuple[int, int]) -> None:
    """The engine makes a non-finite loss NaN and counts on NaN gradients to skip the update."""
    tokens = shape[0] * shape[1]
    hidden, weight, labels = make(tokens=tokens)
    losses = linear_cross_entropy(hidden, weight, labels.clamp_min(0)).view(shape)
    (losses.sum() * math.nan).backward()
    assert hidden.grad.isnan().all() and weight.grad.isnan().all()


def test_no_tokens() -> None:
    hidden, weight, labels = make(tokens=0)
    losses = linear_cross_entropy(hidden, weight, labels)
    losses.sum().backward()
    assert losses.shape == (0,) and hidden.grad.shape == (0, 8) and not weight.grad.any()
    assert linear_argmax(hidden, weight).shape == (0,)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_the_logits_of_a_sequence_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, width, vocabulary, tile = 64, 4, 96, 8
    monkeypatch.setattr(cross_entropy, "LOGIT_BYTES", 4 * vocabulary * tile)
    hidden, weight, labels = make(tokens, width, vocabulary, dtype=torch.float32)
    with LargestTensor() as naive:
        truth(hidden, weight, labels).sum().backward()
    assert naive.elements == tokens * vocabulary
    assert hidden.requires_grad and weight.requires_grad
    with LargestTensor() as tiled:
        linear_cross_entropy(hidden, weight, labels).sum().backward()
        linear_argmax(hidden, weight)
    assert tiled.elements == tile * vocabulary
    monkeypatch.setattr(cross_entropy, "_losses_and_gradient", softmax_and_gradient)
    with LargestTensor() as fused:
        linear_cross_entropy(hidden, weight, labels).sum().backward()
    assert fused.elements == tile * vocabulary


def test_a_vocabulary_larger_than_the_budget_goes_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "LOGIT_BYTES", 1)
    assert_equal_to_truth(*make(tokens=5), scale=1.0, tolerance=1e-12)


def test_the_likeliest_ids(tile: int | None) -> None:
    hidden, weight, _ = make()
    predictions = linear_argmax(hidden, weight)
    assert torch.equal(predictions, (hidden @ weight.T).argmax(dim=-1))
    assert predictions.dtype == torch.int64 and not predictions.requires_grad


def z_truth(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    logits = hidden.double() @ weight.double().T
    return truth(hidden, weight, labels), z_loss * logits.logsumexp(-1).square() * (labels != IGNORED)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["blocks", "as compiled for a GPU"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_z_loss_is_that_of_float64(
    dtype: torch.dtype, tolerance: float, on_gpu: bool, tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_gpu:
        monkeypatch.setattr(cross_entropy, "_losses_and_gradient", softmax_and_gradient)
    hidden, weight, labels = make(dtype=dtype)
    found = linear_cross_entropy_z(hidden, weight, labels, 0.03)
    expected = z_truth(hidden, weight, labels, 0.03)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
    assert torch.equal(found[0], linear_cross_entropy(hidden, weight, labels))
    actual = torch.autograd.grad((found[0].sum() + found[1].sum()) * 0.7, (hidden, weight))
    wanted = torch.autograd.grad((expected[0].sum() + expected[1].sum()) * 0.7, (hidden, weight))
    for gradient, reference in zip(actual, wanted, strict=True):
        error = (gradient.double() - reference.double()).norm() / reference.double().norm()
        assert float(error) <= tolerance
    with torch.no_grad():
        for one, other in zip(linear_cross_entropy_z(hidden, weight, labels, 0.03), expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


def make_bias(seed: int = 3, vocabulary: int = 29, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(vocabulary, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("on_gpu", [False, True], ids=["blocks", "as compiled for a GPU"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_a_bias_is_added_to_the_logits(
    dtype: torch.dtype, tolerance: float, on_gpu: bool, tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_gpu:
        monkeypatch.setattr(cross_entropy, "_losses_and_gradient", softmax_and_gradient)
    leaves = (*make(dtype=dtype), make_bias(dtype=dtype))
    hidden, weight, labels, bias = leaves
    logits = hidden.double() @ weight.double().T + bias.double()
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    z_expected = 0.03 * logits.logsumexp(-1).square() * (labels != IGNORED)
    losses = linear_cross_entropy(hidden, weight, labels, bias=bias)
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    both = linear_cross_entropy_z(hidden, weight, labels, 0.03, bias=bias)
    assert torch.equal(both[0], losses)
    torch.testing.assert_close(both[1].double(), z_expected, rtol=tolerance, atol=tolerance)
    trained = (hidden, weight, bias)
    for actual, wanted in (
        (losses.sum(), expected.sum()),
        (both[0].sum() + both[1].sum(), (expected + z_expected).sum()),
    ):
        found = torch.autograd.grad(-0.37 * actual, trained)
        for gradient, reference in zip(
            found, torch.autograd.grad(-0.37 * wanted, trained, retain_graph=True), strict=True
        ):
            assert gradient.dtype == dtype
            assert float((gradient.double() - reference.double()).norm() / reference.double().norm()) <= tolerance
    if dtype == torch.float64:
        assert torch.equal(linear_argmax(hidden, weight, bias), logits.argmax(dim=-1))


@pytest.mark.parametrize("needs", [(False, False, True), (False, True, False), (True, False, False), (False,) * 3])
def test_only_what_is_trained_gets_a_gradient_beside_a_bias(needs: tuple[bool, ...]) -> None:
    hidden, weight, labels = make()
    bias = make_bias()
    logits = hidden @ weight.T + bias
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    whole = torch.autograd.grad(expected.sum(), (hidden, weight, bias), retain_graph=True)
    leaves = [x.detach().requires_grad_(need) for x, need in zip((hidden, weight, bias), needs, strict=True)]
    losses = linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2])
    torch.testing.assert_close(losses, expected)
    if any(needs):
        losses.sum().backward()
    for leaf, need, reference in zip(leaves, needs, whole, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, reference)


def test_losses_and_z_losses_of_other_scales_are_refused() -> None:
    hidden, weight, labels = make()
    losses, z_losses = linear_cross_entropy_z(hidden, weight, labels, 0.03)
    with pytest.raises(ValueError, match="losses and z-losses have other gradients"):
        (losses.sum() + 2 * z_losses.sum()).backward()


def test_a_tile_is_as_long_as_is_said() -> None:
    assert cross_entropy.tile_of(50_304) == 1334
    assert 4 * 50_304 * 1334 <= cross_entropy.LOGIT_BYTES < 4 * 50_304 * 1335
    assert cross_entropy.tile_of(10**9) == 1
