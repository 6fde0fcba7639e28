"""Error maps are the gradients of their losses, links the mirror maps of their regularisers."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from pipeline.ops.dual_maps import HuberError, PNormError, QNormLink, SoftmaxLink, squared_error


def test_the_mirror_is_the_gradient_of_half_the_squared_norm() -> None:
    dual = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    for q in (2.0, 2.5, 4.0, 6.0):
        half = 0.5 * dual.abs().pow(q).sum(dim=(1, 2)).pow(2 / q)
        (expected,) = torch.autograd.grad(half.sum(), dual)
        torch.testing.assert_close(QNormLink(q)(dual), expected, rtol=1e-9, atol=1e-9)


def test_the_mirror_inverts_that_of_the_dual_exponent() -> None:
    """1/r + 1/q = 1: the mirror map of the regulariser takes the memory back to its dual state."""
    dual = torch.randn(4, 5, dtype=torch.float64)
    q, r = 4.0, 4 / 3
    memory = QNormLink(q)(dual)
    norm = memory.abs().pow(r).sum().pow(1 / r)
    torch.testing.assert_close(norm ** (2 - r) * memory.abs().pow(r - 1) * memory.sign(), dual, rtol=1e-6, atol=1e-6)


def test_degrees() -> None:
    dual = torch.randn(4, 5, dtype=torch.float64)
    mirror, printed = (QNormLink(4.0, form) for form in ("mirror", "printed"))
    torch.testing.assert_close(mirror(10 * dual), 10 * mirror(dual))
    torch.testing.assert_close(printed(10 * dual), printed(dual) / 10)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-3, 1e12, 1e30])
def test_float32_holds_any_size(size: float) -> None:
    dual = (size * torch.randn(4, 5)).requires_grad_()
    memory = QNormLink(4.0)(dual)
    (slope,) = torch.autograd.grad(memory.sum(), dual)
    assert memory.isfinite().all() and slope.isfinite().all()
    if size > 1e-5:
        torch.testing.assert_close(memory / size, QNormLink(4.0)(dual / size), rtol=1e-4, atol=1e-6)


def test_the_slope_of_the_mirror_is_bounded_and_that_of_the_printed_form_is_not() -> None:
    for size in (1e-1, 1e-3):
        dual = size * torch.randn(4, 5, dtype=torch.float64)
        slopes = [
            torch.autograd.functional.jacobian(QNormLink(4.0, form), dual).abs().max() for form in ("mirror", "printed")
        ]
        assert slopes[0] <= 3
        assert slopes[1] > 0.01 / size**2


def test_q_of_two_is_the_identity() -> None:
    dual = torch.randn(4, 5, dtype=torch.float64)
    for form in ("mirror", "printed"):
        torch.testing.assert_close(QNormLink(2.0, form)(dual), dual)


def test_rows_of_the_softmax_add_up_to_its_scale_and_shifts_do_nothing() -> None:
    dual = torch.randn(2, 4, 5, dtype=torch.float64)
    memory = SoftmaxLink(3.0)(dual)
    torch.testing.assert_close(memory.sum(dim=-1), torch.full((2, 4), 3.0, dtype=torch.float64))
    torch.testing.assert_close(SoftmaxLink(3.0)(dual + torch.randn(2, 4, 1, dtype=torch.float64)), memory)


def test_signals_are_the_gradients_of_their_losses() -> None:
    e = torch.randn(50, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.7], dtype=torch.float64)
    norm = e.norm()
    losses = [
        (PNormError(3.0), e.abs().pow(3).sum()),
        (PNormError(1.5, "sqrt", epsilon=0.2), (e**2 + 0.2).pow(0.75).sum()),
        (HuberError(), F.huber_loss(e, torch.zeros_like(e), reduction="sum", delta=0.7)),
        (HuberError("norm"), torch.where(norm <= t, 0.5 * norm**2, t * (norm - 0.5 * t)).sum()),
    ]
    for mapped, loss in losses:
        (expected,) = torch.autograd.grad(loss, e, retain_graph=True)
        torch.testing.assert_close(mapped(e, t), expected)


def test_p_of_two_is_twice_the_squared_error() -> None:
    e = torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(PNormError(2.0)(e), 2 * squared_error(e))


@pytest.mark.parametrize(
    "make_map, message",
    [
        (lambda: PNormError(1.5), "p is 1.5; expected 2 or more, or 1 or more with smooth"),
        (lambda: PNormError(0.5, "sqrt"), "p is 0.5"),
        (lambda: PNormError(3.0, "soft"), "smooth is 'soft'"),
        (lambda: HuberError("both"), "form is 'both'"),
        (lambda: QNormLink(1.5), "q is 1.5; expected 2 or more"),
        (lambda: QNormLink(4.0, "other"), "form is 'other'"),
        (lambda: QNormLink(4.0, epsilon=0.0), "epsilon is 0.0"),
        (lambda: SoftmaxLink(0.0), "scale is 0.0"),
    ],
)
def test_wrong_settings_are_named(make_map: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_map()
