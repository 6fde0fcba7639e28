"""What tokens have in common is taken from each, of those that count."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.systems.neuromorphic.memory.centred import centred


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**9 - 1), st.integers(0, 99))
def test_the_mean_of_counted_tokens_is_left_out(rows: int, tokens: int, mask: int, seed: int) -> None:
    x = torch.randn(2, rows, tokens, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    counted = torch.tensor([bool(mask >> t & 1) for t in range(tokens)]).expand(rows, -1)
    found = centred(x, counted)
    if not counted.any():
        assert torch.equal(found, x)
        return
    torch.testing.assert_close(found[:, :, counted[0]].mean(2), torch.zeros(2, rows, 3, dtype=torch.float64))
    # What all have in common changes nothing.
    torch.testing.assert_close(centred(x + torch.randn(2, rows, 1, 3), counted), found)
    torch.testing.assert_close(found - x, (found - x)[:, :, :1].expand_as(x))


def test_a_large_mean_costs_bfloat16_no_more_than_the_rounding_of_the_result() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (8 + torch.randn(2, 3, 7, 5, generator=generator)).bfloat16()
    counted = torch.rand(3, 7, generator=generator) < 0.7
    assert bool(counted.any(-1).all())
    found = centred(x, counted)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), centred(x.double(), counted), rtol=2**-8, atol=1e-5)
