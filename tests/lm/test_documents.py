"""Sums by document are those of a plain loop, however tokens are split, and intervals are over documents."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.lm import documents
from pipeline.lm.documents import DocumentSums, documents_per_bin, interval
from pipeline.parallel.topology import Topology

BINS = 3


def mean(total: dict[str, Tensor]) -> Tensor:
    return total["value"] / total["labels"]


def tokens(seed: int, rows: int = 3, length: int = 12) -> tuple[Tensor, ...]:
    """Streams [rows], and segments, bins, counted and values [rows, length] of a batch."""
    draw = torch.Generator().manual_seed(seed)
    segments = torch.randint(2, (rows, length), generator=draw).cumsum(1)
    bins = torch.randint(BINS, (rows, length), generator=draw)
    counted = torch.rand(rows, length, generator=draw) < 0.7
    values = torch.rand(rows, length, generator=draw)
    return 5 + torch.arange(rows), segments, bins, counted, values


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_sums_are_those_of_a_loop(seed: int) -> None:
    streams, segments, bins, counted, values = tokens(seed)
    sums = DocumentSums(BINS)
    sums.add(streams, segments, bins, counted, {"value": values, "labels": counted})
    found = sums.gather(Topology())
    expected: dict[tuple[int, int], list[list[float]]] = {}
    for row, place in counted.nonzero().tolist():
        document = expected.setdefault((row, int(segments[row, place])), [[0.0, 0] for _ in range(BINS)])
        document[int(bins[row, place])][0] += float(values[row, place])
        document[int(bins[row, place])][1] += 1
    ordered = torch.tensor([expected[key] for key in sorted(expected)], dtype=torch.float64)
    torch.testing.assert_close(found["value"], ordered[:, :, 0])
    torch.testing.assert_close(found["labels"], ordered[:, :, 1])
    assert documents_per_bin(found["labels"]) == tuple((ordered[:, :, 1] > 0).sum(0).tolist())


@pytest.mark.parametrize("split", ["sequence", "rows", "steps"])
def test_a_document_is_one_however_it_is_split(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over sequence ranks, over data ranks, and over the steps of one rank."""
    streams, *whole = tokens(3)
    values = {"value": whole[3], "labels": whole[2]}
    together = DocumentSums(BINS)
    together.add(streams, *whole[:3], values)
    parts = [DocumentSums(BINS), DocumentSums(BINS)]
    for index, part in enumerate(parts):
        mine = slice(None) if split != "rows" else slice(0, 1) if index == 0 else slice(1, None)
        here = slice(None) if split == "rows" else slice(0, 7) if index == 0 else slice(7, None)
        target = parts[0] if split == "steps" else part
        cut = {name: value[mine, here] for name, value in values.items()}
        target.add(streams[mine], *(part[mine, here] for part in whole[:3]), cut)
    if split != "steps":
        monkeypatch.setattr(documents, "all_gather_object", lambda topology, _: [part._parts for part in parts])
    expected, found = together.gather(Topology()), parts[0].gather(Topology())
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_quantities_that_were_added_apart_belong_to_the_same_documents() -> None:
    streams, segments, bins, counted, values = tokens(4)
    sums = DocumentSums(BINS)
    sums.add(streams, segments, bins, counted, {"value": values})
    sums.add(streams, segments, bins, counted, {"labels": counted, "value": values})
    found = sums.gather(Topology())
    once = DocumentSums(BINS)
    once.add(streams, segments, bins, counted, {"value": 2 * values, "labels": counted})
    for name, value in once.gather(Topology()).items():
        torch.testing.assert_close(found[name], value)


def test_nothing_counted_is_no_document() -> None:
    streams, segments, bins, counted, values = tokens(5)
    sums = DocumentSums(BINS)
    sums.add(streams, segments, bins, torch.zeros_like(counted), {"labels": values})
    assert sums.gather(Topology())["labels"].shape == (0, BINS)


class TestInterval:
    def sums(self, values: Tensor, labels: float = 10.0) -> dict[str, Tensor]:
        return {"value": labels * values, "labels": torch.full_like(values, labels)}

    def test_it_is_that_of_the_normal_distribution_for_many_documents(self) -> None:
        values = torch.randn(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        (low,), (high,) = interval(self.sums(values), mean)
        error = float(values.std()) / math.sqrt(2000)
        assert low == pytest.approx(float(values.mean()) - 1.96 * error, abs=0.25 * error)
        assert high == pytest.approx(float(values.mean()) + 1.96 * error, abs=0.25 * error)

    def test_documents_that_agree_leave_no_doubt(self) -> None:
        values = torch.tensor([[0.5, 2.0]] * 7, dtype=torch.float64)
        for end in interval(self.sums(values), mean):
            assert end == pytest.approx((0.5, 2.0))

    def test_more_tokens_of_the_same_documents_do_not_narrow_it(self) -> None:
        values = torch.rand(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        for few, many in zip(interval(self.sums(values), mean), interval(self.sums(values, 1e6), mean), strict=True):
            assert few == pytest.approx(many)

    def test_below_two_documents_there_is_none(self) -> None:
        values, labels = torch.rand(5, 3, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
        labels[0, 1] = 4
        labels[1:3, 2] = 4
        low, high = interval({"value": values * labels, "labels": labels}, mean)
        assert [math.isnan(end) for end in low] == [math.isnan(end) for end in high] == [True, True, False]

    def test_of_nothing_it_is_nothing(self) -> None:
        low, high = interval({name: torch.zeros(0, 2, dtype=torch.float64) for name in ("value", "labels")}, mean)
        assert all(map(math.isnan, low + high)) and len(low) == len(high) == 2

    def test_it_is_the_same_every_time_and_draws_from_no_other_generator(self) -> None:
        sums = self.sums(torch.rand(20, 2, dtype=torch.float64))
        state = torch.get_rng_state()
        assert interval(sums, mean) == interval(sums, mean)
        assert torch.equal(state, torch.get_rng_state())
