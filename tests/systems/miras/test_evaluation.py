"""An evaluation of this system is that of text or of the recall task, with its memory on, off and emptied."""

from __future__ import annotations

import dataclasses
import types

import pytest
from torch import nn

from pipeline.config import replace
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_recall, miras_tiny
from pipeline.runtime.sync import SyncPoint
from pipeline.systems.miras.config import MirasConfig
from pipeline.systems.miras.evaluation import EMPTIED, EMPTIED_RATIO, OFF, ON, RATIO, evaluate
from tests.lm import systems
from tests.lm.systems import PHASE
from tests.lm.test_recall import Even

SIZES = miras_tiny().model
assert isinstance(SIZES, MirasConfig)


class System(systems.Remembering):
    backbone = types.SimpleNamespace(num_hidden_layers=4)
    sizes = SIZES


def test_text_is_read_with_the_memory_on_and_off() -> None:
    evaluation = evaluate(System(512, steps=3), nn.Linear(1, 1), PHASE, SyncPoint(Topology()))  # type: ignore[arg-type]
    curve = evaluation.curves["perplexity_by_position"]
    assert set(curve.series) == {ON, OFF, EMPTIED, RATIO, EMPTIED_RATIO} and curve.drawn == (RATIO, EMPTIED_RATIO)
    assert curve.edges == {"window of 64": 64, "reach of 4 layers": 4 * 63}
    assert evaluation.scalars["loss"] < evaluation.scalars["memory_off/loss"] == pytest.approx(3)
    assert evaluation.scalars["memory_emptied/loss"] == evaluation.scalars["loss"], "this one only adapts"
    repeated = evaluation.curves["recall_by_distance"]
    assert repeated.drawn == (f"saved, {ON}", f"saved, {OFF}", f"saved, {EMPTIED}")
    assert repeated.edges == {"window of 64": 1.0, "reach of 4 layers": 252 - 63}


def test_a_sequence_too_short_for_two_passages_has_no_such_curve() -> None:
    evaluation = evaluate(System(128), nn.Linear(1, 1), PHASE, SyncPoint(Topology()))  # type: ignore[arg-type]
    assert set(evaluation.curves) == {"perplexity_by_position"}


def test_a_model_without_memory_has_its_own_perplexity_drawn() -> None:
    system = System(512)
    bare = dataclasses.replace(SIZES, memory=dataclasses.replace(SIZES.memory, layers=()))
    system.sizes = bare  # type: ignore[misc]
    evaluation = evaluate(system, nn.Linear(1, 1), PHASE, SyncPoint(Topology()))  # type: ignore[arg-type]
    curve = evaluation.curves["perplexity_by_position"]
    assert set(curve.series) == {ON} and curve.drawn == () and not curve.levels and not curve.intervals
    assert set(evaluation.curves["recall_by_distance"].series) == {ON, f"saved, {ON}"}


def test_the_recall_task_is_read_with_the_memory_on_and_off() -> None:
    config = replace(miras_recall(), evaluation__steps=2)
    system = Even()
    system.config = config
    system.sizes, system.backbone = config.model, types.SimpleNamespace(num_hidden_layers=2)  # type: ignore[attr-defined]
    evaluation = evaluate(system, nn.Linear(1, 1), PHASE, SyncPoint(Topology()))  # type: ignore[arg-type]
    (curve,) = evaluation.curves.values()
    assert set(curve.series) == {ON, OFF, EMPTIED} and curve.levels == {"chance, 1 in 16": 1 / 16}
    assert curve.edges == {"window of 32": 32.0, "reach of 2 layers": 62.0}
    assert 0 < evaluation.scalars["recall"] < 1 and evaluation.scalars["memory_off/recall"] == 0


def test_an_evaluation_leaves_the_models_mode_as_it_found_it() -> None:
    model = nn.Linear(1, 1)
    for training in (True, False):
        model.train(training)
        evaluate(System(128), model, PHASE, SyncPoint(Topology()))  # type: ignore[arg-type]
        assert model.training == training
