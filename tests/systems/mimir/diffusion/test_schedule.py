"""The share of residues that the noise leaves alone."""

from __future__ import annotations

import pytest
import torch

from pipeline.systems.mimir.diffusion.schedule import kept, kept_per_step
from tests.systems.mimir.diffusion.reference import between


def test_ten_steps_keep_what_the_specification_says() -> None:
    expected = [1, 0.986, 0.948, 0.887, 0.805, 0.703, 0.584, 0.451, 0.307, 0.155, 0.000155]
    torch.testing.assert_close(kept(10), torch.tensor(expected, dtype=torch.float64), atol=5e-4, rtol=0)
    assert kept(10)[10] == kept(10)[9] * kept_per_step(10)[10]


@pytest.mark.parametrize("T", [1, 2, 10, 1000])
def test_the_share_falls_from_one_and_stays_above_zero(T: int) -> None:
    shares = kept(T)
    assert shares[0] == 1 and (shares.diff() < 0).all()
    assert 0 < shares[-1] <= 1e-3


@pytest.mark.parametrize("K", [2, 24])
def test_the_closed_form_is_the_product_of_the_matrices(K: int) -> None:
    for t, share in enumerate(kept(10)):
        closed = share * torch.eye(K, dtype=torch.float64) + (1 - share) / K
        torch.testing.assert_close(closed, torch.from_numpy(between(10, K, 0, t)), atol=1e-14, rtol=0)
