"""Whether contexts have forgotten their start, measured at fixed weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.runtime.sync import SyncPoint
from pipeline.systems.cvfp.fixed_point.convergence import convergence
from tests.systems.cvfp.evaluation.reading import Recurrence
from tests.systems.cvfp.fixed_point.small import ONE, ROWS, WIDTH, Small


def measured(small: Small, reader: Recurrence, threshold: float, **layout: int) -> dict[str, float]:
    return convergence(reader, small.open(ONE, **layout), threshold, SyncPoint(ONE))  # type: ignore[arg-type]


def plain(small: Small, reader: Recurrence, threshold: float) -> tuple[float, float]:
    """A document at a time: from zero, and from the end of the one that its stream has read before it."""
    loader = small.open(ONE)
    streams: list[list[Tensor]] = [[] for _ in range(ROWS)]
    for _ in range(loader.slots):
        batch = loader.next_step()[0]
        for row, length in enumerate(batch.lengths.tolist()):
            if length:
                streams[row].append(batch.ids[row : row + 1, :length])
    squares = []
    for stream in streams:
        from_zero = [reader.contexts(ids, torch.ones_like(ids, dtype=torch.bool))[0] for ids in stream]
        for index, ids in enumerate(stream):
            start = from_zero[index - 1][-1:]
            other = reader.contexts(ids, torch.ones_like(ids, dtype=torch.bool), start)[0]
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
