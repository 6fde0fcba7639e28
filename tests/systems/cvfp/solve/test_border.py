"""Borders of a stream over ranks; threads stand for ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.solve import border as module
from pipeline.systems.cvfp.solve.border import Border, from_the_left
from pipeline.systems.cvfp.solve.sweeps import jacobi, newton
from tests.systems.cvfp.ranks import Ranks
from tests.systems.cvfp.small import WIDTH, rows, small


def expected(ends: Tensor, empty: Tensor, first: Tensor, circular: bool) -> Tensor:
    """Row by row."""
    before = first
    if circular and not bool(empty.all()):
        before = ends[~empty][-1]
    found = []
    for row, nothing in zip(ends, empty.tolist(), strict=True):
        found.append(before)
        before = before if nothing else row
    return torch.stack(found)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any), circular=st.booleans(), data=st.data(),
)  # fmt: skip
def test_each_row_gets_its_left_neighbour_of_all_ranks(counts: list[int], circular: bool, data: st.DataObject) -> None:
    """Ranks with any number of rows, and rows without a token."""
    total = sum(counts)
    empty = torch.tensor(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    ends, first = torch.randn(total, 5), torch.randn(5)
    ranks = Ranks(len(counts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "dist", ranks)

        def work(topology: Topology) -> Tensor:
            own = slice(sum(counts[: topology.rank]), sum(counts[: topology.rank + 1]))
            return from_the_left(ends[own], topology, first=first, circular=circular, empty=empty[own])

        found = torch.cat(ranks.run(work))
    assert torch.equal(found, expected(ends, empty, first, circular))
    assert ranks.numbers in (0, 6), "one vector a rank, and whether it has one"


@pytest.mark.parametrize(("way", "circular"), [(jacobi, False), (jacobi, True), (newton, False)])
def test_ranks_solve_a_stream_as_one_does(way: Callable, circular: bool) -> None:
    """Parts of different lengths, different numbers of rows, a rank with no token: contexts and number of sweeps."""
    model, (ids, mask), counts = small(decay=0.3), rows([9, 8, 0, 8, 3]), (2, 1, 2)
    start = torch.zeros(len(ids), WIDTH, dtype=torch.float64)

    def work(topology: Topology) -> Tensor:
        own = slice(0, None)
        if topology.world > 1:
            own = slice(sum(counts[: topology.rank]), sum(counts[: topology.rank + 1]))
        by = partial(way, tolerance=1e-6, most=60, border=Border(topology, circular=circular))
        found = model(ids[own], start=start[own], mask=mask[own], solve=by).solved
        return torch.cat([found.contexts[mask[own]].flatten(), torch.tensor([found.sweeps]).double()])

    one = work(Topology())
    ranks = Ranks(len(counts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "dist", ranks)
        found = ranks.run(work)
    assert {int(part[-1]) for part in found} == {int(one[-1])}
    torch.testing.assert_close(torch.cat([part[:-1] for part in found]), one[:-1], atol=1e-12, rtol=0)
