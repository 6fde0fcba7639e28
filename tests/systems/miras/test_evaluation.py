"""An evaluation of this system is that of text or of the recall task, with its memory on, off and emptied."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.capabilities import Recalls
from pipeline.config import replace
from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.data.long_recall import document_head, fillers, generator, stored_pairs
from pipeline.errors import UserError
from pipeline.lm.long_recall import ask_at_distances, questions
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_recall, miras_recall_long, miras_tiny
from pipeline.runtime.sync import SyncPoint
from pipeline.system import StepContext
from pipeline.systems.miras.config import MirasConfig
from pipeline.systems.miras.evaluation import (
    EMPTIED,
    EMPTIED_RATIO,
    FULL,
    OFF,
    ON,
    RATIO,
    evaluate,
    evaluation_modes,
    full_attention,
)
from tests.lm import systems
from tests.lm.systems import PHASE
from tests.lm.test_recall import Even
from tests.systems.miras.harness import built

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


def test_recall_through_the_carry_is_that_of_the_whole_document() -> None:
    """In float64, the real system: a document read in pieces and asked from a copy of the carry, or in one pass."""
    config = replace(miras_recall_long(), sequence_length=128)
    system, model = built(config)
    task, sync_point = config.data.recall, SyncPoint(Topology())
    assert task is not None
    modes = evaluation_modes(system)
    with torch.no_grad():
        found, memory = ask_at_distances(system, model, sync_point, modes, task, (200, 3000), queries=16)
    assert len(memory) == 2 and memory == sorted(memory)
    for index, distance in enumerate((200, 3000)):
        keys = [(config.seed, "asked", row) for row in range(2)]
        pairs = [stored_pairs(task, generator("asked pairs", *key)) for key in keys]
        ids = np.stack([fillers(task, 0, distance + task.pairs, *key) for key in keys])
        ids[:, : 2 * task.pairs + 1] = np.stack([document_head(task, *stored) for stored in pairs])
        asked, labels = questions(task, pairs, keys, distance)
        whole = torch.from_numpy(np.concatenate([ids, asked], 1))
        labels = torch.from_numpy(np.concatenate([np.full_like(ids, IGNORED), labels], 1))
        positions = torch.arange(whole.shape[1]).expand(2, -1)
        batch = TokenBatch(whole, labels, torch.zeros_like(whole), positions, torch.arange(2))
        for mode, options in modes.items():
            context = StepContext(Topology(), 0, "evaluation", 1, {**options, "predict": True})
            with torch.no_grad():
                tokens = system.forward(model, batch, {}, context).tokens
            assert found[mode][index].nats == pytest.approx(float(tokens["losses"].sum()), rel=1e-9)
            assert found[mode][index].right == float((tokens["predictions"] == labels).sum())
            assert found[mode][index].queries == 16


def test_the_recall_suite_asks_by_distance_and_by_pairs() -> None:
    system, model = built(replace(miras_recall_long(), sequence_length=128), dtype=torch.float32)
    assert isinstance(system, Recalls)
    model.train()
    found = system.recall_suite(model, SyncPoint(Topology()), lengths=(100, 300), queries=8)
    assert model.training
    assert set(found.curves) == {"recall_by_distance", "recall_by_pairs"}
    assert found.curves["recall_by_distance"].x == (100, 300) and found.curves["recall_by_pairs"].x[-1] == 16
    assert found.curves["recall_by_pairs"].edges == {"32, a head's key size": 32.0}
    assert found.scalars["queries"] == 8
    with pytest.raises(UserError, match="--forms needle: miras_recall_long has pairs, and no text: leave it out"):
        system.recall_suite(model, SyncPoint(Topology()), forms=("needle",))


def test_the_recall_suite_asks_about_text_full_attention_too_where_it_was_trained() -> None:
    config = replace(miras_tiny(), sequence_length=256, batch_size=2, parallel__sequence=1)
    assert full_attention(built(config)[0]) is None
    system, model = built(replace(config, evaluation__full_length=4096), dtype=torch.float32)
    options = full_attention(system)(2500)  # type: ignore[misc]
    assert not options["memory"] and options["attention"].window == 2500
    found = system.recall_suite(model, SyncPoint(Topology()), lengths=(2500,), queries=2)
    heat_map = found.heat_maps["needle"]
    assert set(heat_map.series) == {ON, OFF, EMPTIED, FULL} and heat_map.count == 2 and heat_map.x == (2500,)
    assert len(found.curves) == 6 and all(0 <= value <= 1 for value in found.scalars.values())


def test_a_log_spread_is_evaluated_at_the_distances_of_training_and_beyond() -> None:
    config = replace(miras_recall_long(), sequence_length=256)
    assert config.data.recall is not None
    short = dataclasses.replace(config.data.recall, max_gap=240)
    system, model = built(replace(config, data__recall=short), dtype=torch.float32)
    found = system.evaluate(model, PHASE, SyncPoint(Topology()))
    assert found.curves["recall_by_distance"].x == (92, 240, 960) and "memory_off/recall" in found.scalars
