"""Distances of contexts to those of the pass before."""

from __future__ import annotations

import pytest
import torch

from pipeline.systems.cvfp.fixed_point.distances import distances


def test_both_distances_are_alike_for_contexts_of_mean_square_one_and_only_cosine_ignores_the_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.nn.functional.layer_norm(torch.randn(2, 7, 64, generator=generator, dtype=torch.float64), (64,))
    raw, cosine = (distances(one, other, kind) for kind in ("raw", "cosine"))
    assert torch.allclose(raw, ((one - other) ** 2).sum(1) / 64)
    assert torch.allclose(raw, cosine, rtol=1e-3)
    assert torch.allclose(distances(3 * one, other, "cosine"), cosine)
    assert not torch.allclose(distances(3 * one, other, "raw"), raw)


@pytest.mark.parametrize("kind", ["raw", "cosine"])
def test_the_range_of_both_distances(kind: str) -> None:
    one = torch.nn.functional.layer_norm(torch.randn(5, 32, generator=torch.Generator().manual_seed(1)), (32,))
    assert float(distances(one, one, kind).abs().max()) < 1e-6
    assert torch.allclose(distances(one, -one, kind), torch.full((5,), 4.0), rtol=1e-3)
