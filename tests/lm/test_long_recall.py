"""Recall through the carry: what is asked, how it is read, and that nothing asked is stored."""

from __future__ import annotations

import types
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from torch import nn

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.data_config import RecallConfig
from pipeline.errors import UserError
from pipeline.lm.long_recall import PERIOD, evaluate_capacity, evaluate_long_recall
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import StepContext
from tests.lm.systems import MODES, OFF, ON, config

TASK = RecallConfig(keys=64, values=8, fillers=4, pairs=4, queries=4, max_gap=2048, spread="log")


class Table:
    """A model whose memory is a dictionary of the first `slots` pairs that a row has shown, with what it was given.

    It stores every pair that it sees, also after a query: what is asked must come from a carry of before.
    """

    def __init__(self, slots: int = 1000, length: int = 256, span: int = 10**9) -> None:
        self.config, self.slots, self.span = config(length), slots, span
        self.asked: list[tuple[int, bool]] = []
        self.read: list[tuple[int, int]] = []

    def forward(self, model: nn.Module, batch: TokenBatch, carry: Mapping, context: StepContext) -> object:
        stored = [dict(row) for row in carry.get("stored", [{}] * batch.rows)]
        predictions = torch.full_like(batch.labels, -1)
        questions = bool((batch.labels != IGNORED).any())
        (self.asked if questions else self.read).append(
            (int(batch.positions[0, 0]), bool(context.options["memory"]))  # type: ignore[arg-type]
        )
        for row in range(batch.rows):
            ids, places = batch.input_ids[row].tolist(), batch.positions[row].tolist()
            for index, (token, place) in enumerate(zip(ids, places, strict=True)):
                if not 1 <= token <= TASK.keys:
                    continue
                value, at = stored[row].get(token, (-1, 0))
                if context.options["memory"] and place - at <= self.span:
                    predictions[row, index] = value
                if len(stored[row]) < self.slots:
                    stored[row][token] = (ids[index + 1], place)
        losses = torch.where(predictions == batch.labels, 0.0, 2.0) * (batch.labels != IGNORED)
        return types.SimpleNamespace(tokens={"losses": losses, "predictions": predictions}, carry={"stored": stored})


def evaluate(system: Table, distances: tuple[int, ...] = (256, 1024, 5000), task: RecallConfig = TASK, **options):
    arguments = (system, nn.Linear(1, 1), SyncPoint(Topology()), MODES, task)
    return evaluate_long_recall(*arguments, edges={}, distances=distances, **options)  # type: ignore[arg-type]


def test_a_perfect_memory_answers_at_every_distance() -> None:
    system = Table()
    found = evaluate(system)
    assert found.scalars["queries"] == 96 and found.scalars["recall"] == 1 and found.scalars["memory_off/recall"] == 0
    assert [found.scalars[f"recall/{d}"] for d in (256, 1024, 5000)] == [1, 1, 1]
    assert found.scalars["memory_off/loss"] == 2 and found.scalars["loss"] == 0
    curve = found.curves["recall_by_distance"]
    assert curve.counts == (96, 96, 96) and curve.levels == {"chance, 1 in 8": 1 / 8}
    assert curve.series == {ON: (1, 1, 1), OFF: (0, 0, 0)}
    assert 0.96 < curve.intervals[ON][0][0] < 0.97 and curve.intervals[ON][1][0] == 1
    assert [start for start, memory in system.asked if memory] == [260, 1028, 5004]
    assert all(found.scalars[f"peak_memory/{d}"] > 0 for d in (256, 1024, 5000))


def test_what_was_asked_is_not_stored() -> None:
    """A memory of 600 tokens answers at 256 and no more at 1024, although the answers stood there at 256."""
    found = evaluate(Table(span=600))
    assert [found.scalars[f"recall/{d}"] for d in (256, 1024, 5000)] == [1, 0, 0]


def test_the_text_is_read_once_and_in_bounded_pieces() -> None:
    system = Table(length=768)
    evaluate(system, (256, 1024, 9000))
    starts = [start for start, memory in system.read if memory]
    assert starts == sorted(set(starts)) and starts[:2] == [0, 260]
    assert max(b - a for a, b in pairwise(starts)) == 2304


def test_documents_make_at_least_the_queries_asked_for() -> None:
    assert evaluate(Table(), queries=30).scalars["queries"] == 32


def test_capacity_shows_where_a_memory_is_full() -> None:
    arguments = (Table(slots=8), nn.Linear(1, 1), SyncPoint(Topology()), MODES, TASK)
    found = evaluate_capacity(*arguments, edges={"slots": 8.0}, queries=64)  # type: ignore[arg-type]
    curve = found.curves["recall_by_pairs"]
    assert curve.x == (1, 2, 4, 8, 16, 32, 64) and curve.edges == {"slots": 8.0}
    assert [found.scalars[f"capacity/{pairs}"] for pairs in (1, 4, 8, 16, 32, 64)] == [1, 1, 1, 1 / 2, 1 / 4, 1 / 8]
    assert curve.series[OFF] == (0,) * 7 and min(curve.counts) >= 64


def test_queries_stand_apart() -> None:
    assert PERIOD >= 4, "an answer is not the next query's neighbour"


@pytest.mark.parametrize(
    "distances, message", [((3, 100), "give 6 or more"), ((100, 100), "rising"), ((200, 100), "rising"), ((), "empty")]
)
def test_distances_that_cannot_be_asked_at_are_refused(distances: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(Table(), distances)
