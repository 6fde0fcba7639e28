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
    together = noise(batch([0, 40, 7]), 4, seed=3, way="circular")
    assert together.shape == (3, 6, 4)
    assert torch.equal(torch.cat([noise(batch([first]), 4, seed=3, way="circular") for first in (0, 40, 7)]), together)


def test_the_noise_is_another_in_every_pass_of_every_seed_and_is_standard_normal() -> None:
    one = noise(batch([5], length=500), 8, seed=0, way="document")
    for other in (batch([5], 2, 500), batch([6], length=500)):
        assert abs(float((noise(other, 8, seed=0, way="document") * one).mean())) < 0.06
    assert abs(float((noise(batch([5], length=500), 8, seed=1, way="document") * one).mean())) < 0.06
    assert abs(float(one.mean())) < 0.06 and abs(float(one.std()) - 1) < 0.05


def test_the_noise_of_a_token_depends_on_its_global_position_alone() -> None:
    """Wherever its row begins: as where the same stream is cut otherwise."""
    for width in (1, 4, 7, 768):
        whole = noise(batch([3], length=12), width, seed=0, way="stream")
        cut = noise(batch([3, 9], length=6), width, seed=0, way="stream")
        assert whole.shape == (1, 12, width)
        assert torch.equal(whole[0], cut.flatten(0, 1))
        assert len(whole.unique()) == whole.numel()


def test_a_start_that_is_no_context_has_no_noise() -> None:
    documents, stream = (noise(batch([0, 6]), 4, seed=0, way=way) for way in ("document", "stream"))
    assert not documents[:, 0].any() and not stream[0, 0].any()
    assert stream[1, 0].all() and documents[:, 1:].all()
    assert torch.equal(documents[:, 1:], stream[:, 1:])
