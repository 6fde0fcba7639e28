"""Second moments of contexts, from sums."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.fixed_point.statistics import ContextSums


@given(st.integers(1, 5), st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 1000))
@settings(max_examples=20)
def test_micro_batches_add_up_to_the_moments_of_all(width: int, sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, width, generator=generator, dtype=torch.float64) for size in sizes]
    sums = ContextSums(width, torch.device("cpu"))
    for part in parts:
        sums.add(part)
    whole = torch.cat(parts)
    expected = whole.T @ whole / max(1, len(whole))
    moments, count = sums.moments(Topology())
    assert torch.allclose(moments, expected, rtol=1e-12, atol=1e-12) and count == len(whole)


def test_sums_of_float32_contexts_lose_nothing_over_many_batches() -> None:
    sums = ContextSums(1, torch.device("cpu"))
    sums.add(torch.full((1, 1), 4096.0))
    for _ in range(100):
        sums.add(torch.full((1, 1), 0.5))
    assert float(sums.moments(Topology())[0]) * 101 == 4096.0**2 + 25
