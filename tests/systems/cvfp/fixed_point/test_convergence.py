"""Whether contexts have forgotten their start, measured at fixed weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.systems.cvfp.documents import DocumentBatch
from pipeline.systems.cvfp.fixed_point import convergence as module
from pipeline.systems.cvfp.fixed_point.convergence import convergence
from pipeline.systems.cvfp.solve import border
from pipeline.systems.cvfp.untrained import untrained_reader
from tests.systems.cvfp.evaluation.reading import Recurrence
from tests.systems.cvfp.fixed_point.small import LENGTHS, ONE, ROWS, WIDTH, Small
from tests.systems.cvfp.ranks import Ranks, Together


def measured(small: Small, reader: Recurrence, threshold: float, **layout: int) -> dict[str, float]:
    return convergence(reader, small.open(ONE, **layout), threshold, SyncPoint(ONE))  # type: ignore[arg-type]


def plain(small: Small, reader: Recurrence, threshold: float) -> tuple[float, float]:
    """A document at a time: from zero, and from the end of the one before it, in the order of streams."""
    loader = small.open(ONE)
    batches = [loader.next_step()[0] for _ in range(loader.slots)]
    rows = [(batch.ids[row], int(batch.lengths[row])) for row in range(ROWS) for batch in batches]
    documents = [ids[None, :length] for ids, length in rows if length]
    masks = [torch.ones_like(ids, dtype=torch.bool) for ids in documents]
    from_zero = [reader.contexts(ids, mask)[0] for ids, mask in zip(documents, masks, strict=True)]
    squares = []
    for index, (ids, mask) in enumerate(zip(documents, masks, strict=True)):
        other = reader.contexts(ids, mask, from_zero[index - 1][-1:])[0]
        squares.append((from_zero[index] - other).square().mean(-1))
    found = torch.cat(squares)
    return float((found < threshold).double().mean()), float(found.mean())


@pytest.mark.parametrize("factor", [0.2, 0.9, 1.5])
def test_it_is_the_share_that_a_document_at_a_time_has(factor: float) -> None:
    small = Small()
    reader = Recurrence(width=WIDTH, vocab=13, factor=factor)
    threshold = 0.01
    found = measured(small, reader, threshold)
    share, square = plain(small, reader, threshold)
    assert found["converged"] == pytest.approx(share, abs=1e-12)
    assert found["start_distance"] == pytest.approx(square, rel=1e-6)
    assert 0 < found["converged"] < 1


FEW = {"one slot": ([9, 4, 7, 6, 5], 4), "two slots": ([9, 4, 7, 6, 5, 8], 5), "rows without any": ([9, 4, 3], 2)}


@pytest.mark.parametrize("name", FEW)
def test_the_other_document_is_never_the_same_one(name: str) -> None:
    """A stream with one document alone would begin it at its own end."""
    small = Small(lengths=FEW[name][0], training=FEW[name][1])
    reader = Recurrence(width=WIDTH, vocab=13, factor=1.5)
    share, square = plain(small, reader, 0.05)
    for layout in ({}, {"rows": 1, "grad_accum": 4}, {"rows": 2, "grad_accum": 2}):
        found = measured(small, reader, 0.05, **layout)
        assert found["converged"] == pytest.approx(share, abs=1e-12)
        assert found["start_distance"] == pytest.approx(square, rel=1e-6)


def test_of_one_document_there_is_no_other() -> None:
    found = measured(Small(lengths=[9, 4], training=1), Recurrence(width=WIDTH, vocab=13), 0.05)
    assert all(math.isnan(value) for value in found.values())


def test_ranks_measure_what_one_does() -> None:
    for lengths, training in (*FEW.values(), (LENGTHS, 10)):
        small, reader = Small(lengths=lengths, training=training), Recurrence(width=WIDTH, vocab=13, factor=0.9)
        whole = measured(small, reader, 0.01)
        ranks = Ranks(2)

        def work(topology: Topology, small: Small = small, reader: Recurrence = reader) -> Tensor:
            loader = small.open(topology, rows=1, grad_accum=2, data_rank=topology.rank, data_degree=2)
            found = convergence(reader, loader, 0.01, Together(topology))  # type: ignore[arg-type]
            return torch.tensor(list(found.values()), dtype=torch.float64)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(border, "dist", ranks)
            patch.setattr(module, "reduce_sums", ranks.reduce_sums)
            found = ranks.run(work)
        for values in found:
            assert values.tolist() == pytest.approx(list(whole.values()), rel=1e-9)


@pytest.mark.parametrize("goes_on", [False, True])
def test_the_rule_of_the_guide_compares_with_the_contexts_of_the_pass_before(goes_on: bool) -> None:
    """A document at a time; those of one slot had no pass before."""
    small, reader = Small(), Recurrence(width=WIDTH, vocab=13, factor=0.9)
    trained = Recurrence(width=WIDTH, vocab=13, factor=0.6)

    def before(batch: DocumentBatch) -> Tensor | None:
        return None if batch.slot == 1 else trained.contexts(batch.ids, batch.mask)

    loader = small.open(ONE)
    batches = [loader.next_step()[0] for _ in range(loader.slots)]
    ends = {}
    for batch in batches:
        for row, length in enumerate(batch.lengths.tolist()):
            if length:
                ids = batch.ids[row : row + 1, :length]
                ends[row, batch.slot] = reader.contexts(ids, torch.ones_like(ids, dtype=torch.bool))[0, -1:]
    order = sorted(ends)
    squares = []
    for number, (row, slot) in enumerate(order):
        if slot != 1:
            ids = batches[slot].ids[row : row + 1, : batches[slot].lengths[row]]
            mask = torch.ones_like(ids, dtype=torch.bool)
            start = ends[order[number - 1]] if goes_on else None
            squares.append((reader.contexts(ids, mask, start) - trained.contexts(ids, mask)).square().mean(-1)[0])
    expected = torch.cat(squares) < 0.01
    plain = measured(small, reader, 0.01)
    found = convergence(reader, small.open(ONE), 0.01, SyncPoint(ONE), before=before, goes_on=goes_on)  # type: ignore[arg-type]
    assert found.pop("converged_pass_to_pass") == pytest.approx(float(expected.double().mean()), abs=1e-12)
    assert 0 < expected.sum() < len(expected)
    # What does not depend on a pass before is as without it.
    assert found == plain


def test_weights_that_were_never_trained_are_measured_alike() -> None:
    small = Small()
    found = {}
    for seed in (0, 1):
        reader = untrained_reader(small.model, small.work.sizes, seed, published=False)
        found[seed] = convergence(reader, small.open(ONE), 0.05, SyncPoint(ONE))
    # `small` has the weights that seed 0 draws.
    own = small.work.evaluate(small.model, SyncPoint(ONE)).scalars
    assert found[0]["converged"] == own["converged"]
    assert found[0]["start_distance"] == pytest.approx(own["start_distance"], rel=1e-4)
    assert found[1] != found[0]


def test_micro_batches_change_nothing_and_the_bounds_of_the_threshold_are_none_and_all() -> None:
    small, reader = Small(), Recurrence(width=WIDTH, vocab=13, factor=0.7)
    whole = measured(small, reader, 0.01)
    for layout in ({"rows": 1, "grad_accum": 4}, {"rows": 2, "grad_accum": 2}):
        assert measured(small, reader, 0.01, **layout) == pytest.approx(whole)
    assert measured(small, reader, 1e-300)["converged"] == 0.0
    assert measured(small, reader, 1e9)["converged"] == 1.0


def test_contexts_that_forget_little_converge_late_in_a_row() -> None:
    """The pass-to-pass rule would call all of them converged: at fixed weights and one start, passes do not differ."""
    small = Small(lengths=[9] * 12)
    shares = [
        measured(small, Recurrence(width=WIDTH, vocab=13, factor=factor, seed=1), 0.05)["converged"]
        for factor in (0.1, 0.5, 6.0)
    ]
    assert shares[0] > shares[1] > shares[2]


def test_evaluation_reports_training_and_held_out_documents() -> None:
    small = Small()
    scalars = small.work.evaluate(small.model, SyncPoint(ONE)).scalars
    assert scalars.keys() == {"converged", "start_distance", "converged_val", "start_distance_val"}
    assert all(0 <= scalars[name] <= 1 for name in ("converged", "converged_val"))
