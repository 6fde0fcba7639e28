"""The scan over sequence ranks, with threads for ranks; tests/launch/test_scan.py has real ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops import miras_scan
from pipeline.parallel import scan as module
from pipeline.parallel.scan import sequence_scan
from pipeline.parallel.topology import Topology
from tests.ops.scan_cases import NAMES, TIGHT, assert_close, gradients, make, segments


class Ranks:
    """Stands in for torch.distributed: the ranks are threads of this process."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)
        self.sent: list[Tensor | None] = [None] * count
        self.collectives = 0
        self.bytes = 0
        self.place = threading.local()

    def all_gather_into_tensor(self, received: Tensor, send: Tensor, group: object) -> None:
        assert group is self
        self.sent[self.place.rank] = send
        self.barrier.wait()
        received.copy_(torch.cat([part for part in self.sent if part is not None]))
        if self.place.rank == 0:
            self.collectives += 1
            self.bytes += send.numel()
        self.barrier.wait()

    def run(self, work: Callable[[Topology], object]) -> list:
        results: list = [None] * len(self.sent)
        problems: list[BaseException] = []

        def body(rank: int) -> None:
            self.place.rank = rank
            try:
                results[rank] = work(Topology(rank, len(self.sent), len(self.sent), self))  # type: ignore[arg-type]
            except BaseException as problem:
                problems.append(problem)
                self.barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(len(self.sent))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for problem in problems:
            raise problem
        return results


def scan_on_ranks(
    x: Sequence[Tensor], sizes: Sequence[int], segment_ids: Tensor | None = None, **options
) -> tuple[list[Tensor], list[Tensor], Ranks]:
    """Outputs and gradients of the whole, put together from the ranks, under the cotangents of ``gradients``."""
    ranks = Ranks(len(sizes))
    cuts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    generator = torch.Generator().manual_seed(1)
    shapes = [(*x[0].shape[:3], x[2].shape[-1]), x[6].shape, x[6].shape]
    cotangents = [torch.randn(shape, generator=generator, dtype=torch.float64).to(x[6].dtype) for shape in shapes]

    def work(topology: Topology) -> tuple[list[Tensor], list[Tensor]]:
        mine = slice(cuts[topology.rank], cuts[topology.rank + 1])
        own = [(z[:, mine] if index < 6 else z).detach().clone().requires_grad_() for index, z in enumerate(x)]
        ids = None if segment_ids is None else segment_ids[:, mine]
        y, state = sequence_scan(*own[:6], topology=topology, state=(own[6], own[7]), segment_ids=ids, **options)
        given = [cotangents[0][:, mine], *(z / len(sizes) for z in cotangents[1:])]
        return [y, *state], list(torch.autograd.grad([y, *state], own, given, materialize_grads=True))

    found = ranks.run(work)
    outputs = [torch.cat([rank[0][0] for rank in found], dim=1), *found[0][0][1:]]
    for rank in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rank[0][1:], outputs[1:], strict=True))
    grads = [torch.cat([rank[1][index] for rank in found], dim=1) for index in range(6)]
    for index in (6, 7):
        assert not any(rank[1][index].any() for rank in found[1:])
        grads.append(found[0][1][index])
    return outputs, grads, ranks


def assert_same_scan(x: Sequence[Tensor], sizes: Sequence[int], segment_ids: Tensor | None = None, **options) -> None:
    outputs, grads, _ = scan_on_ranks(x, sizes, segment_ids, **options)
    y, state = miras_scan(*x[:6], state=(x[6], x[7]), segment_ids=segment_ids, **options)
    expected = [y, *state]
    assert_close(outputs, expected, ("y", "M", "S"), TIGHT)
    assert_close(grads, gradients(expected, x), NAMES, TIGHT)


@pytest.mark.parametrize("rule", ["titans", "delta"])
@pytest.mark.parametrize("sizes", [(30, 30), (1, 1, 1), (20, 1, 39), (65, 3, 64, 1)], ids=str)
@pytest.mark.parametrize("gates", ["any", "model"])
def test_parts_are_the_whole_scan(sizes: tuple[int, ...], rule: str, gates: str) -> None:
    assert_same_scan(make(sequence=sum(sizes), gates=gates), sizes, rule=rule, chunk=16)


@pytest.mark.parametrize(
    "starts", [(20,), (19,), (21,), (19, 20, 21), (20, 40), (40, 41), tuple(range(1, 60))], ids=str
)
def test_segments_that_start_at_a_border_of_ranks_or_near_it(starts: tuple[int, ...]) -> None:
    assert_same_scan(make(sequence=60, gates="model"), (20, 20, 20), segments(2, 60, starts), chunk=16)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=5), st.integers(0, 1000), st.sampled_from(["titans", "delta"]))
def test_any_layout_is_the_whole_scan(sizes: list[int], seed: int, rule: str) -> None:
    length = sum(sizes)
    ids = (torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.1).int().cumsum(dim=1)
    assert_same_scan(make(2, length, 2, 4, 3, seed=seed, gates="model"), sizes, ids, rule=rule, chunk=8)


def test_one_collective_each_way_whose_size_does_not_depend_on_the_length() -> None:
    def cost(length: int) -> tuple[int, int]:
        ranks = scan_on_ranks(make(1, length, 3, 8, 8, dtype=torch.float32), [length // 2] * 2)[2]
        return ranks.collectives, ranks.bytes

    forward, backward = 16 * (16 + 8), 2 * 16 * 8
    assert cost(32) == cost(512) == (2, 3 * 4 * (forward + backward))


def test_rows_of_a_batch_have_their_own_borders() -> None:
    ids = torch.zeros(2, 60, dtype=torch.int64)
    ids[0, 20:] = 1
    assert_same_scan(make(sequence=60, gates="model"), (20, 20, 20), ids)


def test_one_rank_needs_no_group() -> None:
    x = make(sequence=40)
    y, state = sequence_scan(*x[:6], topology=Topology(), state=(x[6], x[7]))
    expected, expected_state = miras_scan(*x[:6], state=(x[6], x[7]))
    assert all(torch.equal(a, b) for a, b in zip([y, *state], [expected, *expected_state], strict=True))


def test_errors_come_before_the_collective() -> None:
    x = [z.detach() for z in make(sequence=6)]
    topology = Topology(0, 2, 2, object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"v has shape \[2, 5, 2, 6\]"):
        sequence_scan(x[0], x[1], x[2][:, :5], *x[3:6], topology=topology)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(received: Tensor, send: Tensor, group: Ranks) -> None:
        group.all_gather_into_tensor(received, send, group)

    monkeypatch.setattr(module.dist, "all_gather_into_tensor", gather)
