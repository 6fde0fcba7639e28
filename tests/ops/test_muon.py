"""Muon's orthogonalisation maps the singular values and leaves the singular vectors."""

import pytest
import torch

from pipeline.ops.muon import newton_schulz
from tests.ops.scan_cases import error


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (2, 5, 8)])
def test_it_maps_the_singular_values(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    actual, expected = newton_schulz(x), u @ torch.diag_embed(s) @ vh
    assert error(actual, expected) <= 1e-10
    cotangent = torch.randn_like(actual)
    assert error(*(torch.autograd.grad(z, x, cotangent)[0] for z in (actual, expected))) <= 1e-7


def test_singular_values_end_near_one() -> None:
    values = torch.linalg.svdvals(newton_schulz(torch.randn(20, 32, 64)))
    assert float(values.min()) > 0.65 and float(values.max()) < 1.25


def test_the_scale_of_a_matrix_does_not_matter_and_zeros_stay_zeros() -> None:
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(1e3 * x), newton_schulz(x))
    zeros = torch.zeros(5, 6, requires_grad=True)
    result = newton_schulz(zeros)
    assert not result.any()
    assert torch.autograd.grad(result.sum(), zeros)[0].isfinite().all()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"matrices has shape \[3\]"):
        newton_schulz(torch.zeros(3))
    with pytest.raises(ValueError, match="steps is 0"):
        newton_schulz(torch.zeros(3, 3), steps=0)
