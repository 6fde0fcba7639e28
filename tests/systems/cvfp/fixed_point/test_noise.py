"""Noise that tokens, not layouts, decide."""

from __future__ import annotations

import torch

from pipeline.systems.cvfp.documents import DocumentBatch
from pipeline.systems.cvfp.fixed_point.noise import noise


def batch(first: list[int], iteration: int = 1, length: int = 6) -> DocumentBatch:
    rows = len(first)
    lengths = torch.full((rows,), length)
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return DocumentBatch(ids, lengths, torch.arange(rows), torch.tensor(first), slot=0, slots=1, iteration=iteration)


def test_the_noise_of_a_row_depends_on_its_place_in_the_data_and_not_on_the_rows_beside_it() -> None:
    together = noise(batch([0, 40, 7]), 4, seed=3)
    assert together.shape == (3, 6, 4)
    assert torch.equal(torch.cat([noise(batch([first]), 4, seed=3) for first in (0, 40, 7)]), together)


def test_the_noise_is_another_in_every_pass_of_every_seed_and_is_standard_normal() -> None:
    one = noise(batch([5], length=500), 8, seed=0)
    for other in (batch([5], 2, 500), batch([6], length=500)):
        assert abs(float((noise(other, 8, seed=0) * one).mean())) < 0.06
    assert abs(float((noise(batch([5], length=500), 8, seed=1) * one).mean())) < 0.06
    assert abs(float(one.mean())) < 0.06 and abs(float(one.std()) - 1) < 0.05
