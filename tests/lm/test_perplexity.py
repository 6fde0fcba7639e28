"""What an evaluation of text finds is what the losses say."""

from __future__ import annotations

import math

import pytest
from torch import Tensor, nn

from pipeline.data.batch import TokenBatch
from pipeline.lm.passages import repeated_passages
from pipeline.lm.perplexity import evaluate_perplexity
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation
from tests.lm.systems import EDGES, MODES, OFF, ON, PHASE, WINDOW, Remembering, System

RATIO = "memory off / on"
RATIOS = {RATIO: (OFF, ON)}


def evaluated(system: System) -> Evaluation:
    return evaluate_perplexity(
        system, nn.Linear(1, 1), PHASE, SyncPoint(Topology()), MODES, edges=EDGES, ratios=RATIOS,  # type: ignore[arg-type]
    )  # fmt: skip


def test_perplexity_by_position_is_the_ratio_with_and_without_the_memory() -> None:
    evaluation = evaluated(Remembering(512, steps=3))
    curve = evaluation.curves["perplexity_by_position"]
    labels, documents = 2 * 3 * 2 * 255, 2 * 3 * 2
    assert evaluation.scalars["labels"] == labels == sum(curve.counts)
    assert evaluation.scalars["documents"] == documents == curve.documents[0]
    assert evaluation.scalars["memory_off/loss"] == pytest.approx(3)
    assert evaluation.scalars["bpb"] == pytest.approx(evaluation.scalars["loss"] / math.log(2) / 2)
    assert curve.drawn == (RATIO,) and set(curve.series) == {ON, OFF, RATIO}
    assert curve.drawn_label == f"perplexity, {RATIO}"
    for index, (edge, count) in enumerate(zip(curve.x, curve.counts, strict=True)):
        ratio = curve.series[RATIO][index]
        if count:
            assert ratio == pytest.approx(curve.series[OFF][index] / curve.series[ON][index])
            assert ratio == pytest.approx(1.0 if edge <= WINDOW else math.exp(0.5))
            low, high = (ends[index] for ends in curve.intervals[RATIO])
            assert low == pytest.approx(ratio) and high == pytest.approx(ratio), "all documents agree"
        else:
            assert math.isnan(ratio) and not curve.documents[index]
    assert curve.edges == EDGES
    assert curve.levels == {"no difference": 1.0}


def test_modes_that_do_the_same_are_run_once() -> None:
    """Of perplexity and of repeated passages: a mode more with the options of another costs no forward pass."""
    for measure in (
        lambda system, modes: evaluate_perplexity(
            system, nn.Linear(1, 1), PHASE, SyncPoint(Topology()), modes, edges={}, ratios={}
        ).curves["perplexity_by_position"],
        lambda system, modes: repeated_passages(system, nn.Linear(1, 1), PHASE, SyncPoint(Topology()), modes, edges={}),
    ):
        two, three = Remembering(512), Remembering(512)
        measure(two, MODES)
        curve = measure(three, {**MODES, "memory emptied": MODES[OFF]})
        assert two.forwards == three.forwards > 0
        assert curve.series["memory emptied"] == pytest.approx(curve.series[OFF], nan_ok=True)
        assert curve.series["memory emptied"] != pytest.approx(curve.series[ON], nan_ok=True)


def test_documents_that_differ_widen_the_interval() -> None:
    class Uneven(System):
        def loss(self, memory: bool, batch: TokenBatch) -> Tensor:
            return super().loss(memory, batch) - memory * (0.1 + 0.2 * (batch.segment_ids % 2))

    curve = evaluated(Uneven(512, steps=4)).curves["perplexity_by_position"]
    low, high = (ends[0] for ends in curve.intervals[RATIO])
    assert math.exp(0.1) <= low < curve.series[RATIO][0] < high <= math.exp(0.3)


def test_a_system_with_one_mode_has_its_own_perplexity_drawn() -> None:
    evaluation = evaluate_perplexity(
        System(512), nn.Linear(1, 1), PHASE, SyncPoint(Topology()), {"model": {}}, edges={}, ratios={},  # type: ignore[arg-type]
    )  # fmt: skip
    curve = evaluation.curves["perplexity_by_position"]
    assert set(evaluation.scalars) == {"loss", "ppl", "bpb", "labels", "documents"}
    assert set(curve.series) == {"model"} and curve.drawn == () and not curve.levels and not curve.intervals
