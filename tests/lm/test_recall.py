"""The recall task shows the share of right answers by distance, beside chance."""

from __future__ import annotations

import types
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from pipeline.data.batch import TokenBatch
from pipeline.data.synthetic import RecallLoader
from pipeline.data_config import RecallConfig
from pipeline.lm.recall import GAP_BIN, evaluate_recall
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Phase, StepContext
from tests.lm.systems import EDGES, MODES, ON, PHASE, config

TASK = RecallConfig(keys=16, values=16, fillers=16)


class Even:
    """On the loader of the task, with a model whose memory answers every query whose distance is even."""

    def __init__(self) -> None:
        self.config = config(256, steps=2)

    def held_out(self, phase: Phase, topology: Topology) -> RecallLoader:
        return RecallLoader(TASK, sequence_length=256, batch_size=4, held_out=True)

    def file_loaders(self, topology: Topology) -> dict[str, RecallLoader]:
        return {}

    def forward(self, model: nn.Module, batch: TokenBatch, carry: Mapping, context: StepContext) -> object:
        first = (batch.input_ids[:, None] == batch.input_ids[..., None]).long().argmax(-1)
        even = (torch.arange(batch.labels.shape[1]) - first - 1) % 2 == 0
        right = even & bool(context.options["memory"])
        return types.SimpleNamespace(
            tokens={"losses": torch.ones(batch.labels.shape), "predictions": torch.where(right, batch.labels, -1)},
            carry={},
        )


def test_the_recall_task_shows_chance_and_reach() -> None:
    evaluation = evaluate_recall(
        Even(), nn.Linear(1, 1), PHASE, SyncPoint(Topology()), MODES, TASK, edges=EDGES,  # type: ignore[arg-type]
    )  # fmt: skip
    curve = evaluation.curves["recall_by_distance"]
    assert curve.levels == {"chance, 1 in 16": 1 / 16} and curve.edges == EDGES
    assert evaluation.scalars["documents"] == 8 and sum(curve.counts) == 8 * TASK.queries
    answered = sum(share * count for share, count in zip(curve.series[ON], curve.counts, strict=True) if count)
    assert answered == pytest.approx(8 * TASK.queries * evaluation.scalars["recall"])
    assert 0 < evaluation.scalars["recall"] < 1 and evaluation.scalars["memory_off/recall"] == 0
    for index, count in enumerate(curve.counts):
        assert not count or TASK.min_gap < curve.x[index] <= TASK.max_gap + GAP_BIN
        low, high = (ends[index] for ends in curve.intervals[ON])
        assert not count or curve.documents[index] < 2 or 0 <= low <= curve.series[ON][index] <= high <= 1
