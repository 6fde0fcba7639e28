"""What the system measures of its own model: untrained baselines, the suite, and the comparison with a control."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import RunConfig
from pipeline.load import checked_system
from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.evaluation import contexts
from pipeline.systems.cvfp.evaluation.contexts import CRITERIA
from pipeline.systems.cvfp.evaluation.control import ABLATED, LABELS, MODEL, UNIGRAM
from pipeline.systems.cvfp.evaluation.prediction import nats_by_row
from pipeline.systems.cvfp.fixed_point.convergence import convergence
from pipeline.systems.cvfp.system import CvfpSystem
from tests.systems.cvfp.evaluation.reading import ONE
from tests.systems.cvfp.harness import documents, small

ALONE = Topology()


def made(config: RunConfig, *, moved: float = 0.0) -> tuple[CvfpSystem, nn.Module]:
    """The system of a run, with its data, and its model, whose weights are `moved` from the first ones."""
    system = checked_system(config, ALONE)
    system.files = system.list_data()
    system = checked_system(system.settled(ALONE), ALONE)
    system.files = system.list_data()
    assert isinstance(system, CvfpSystem)
    model = system.build()
    system.initialise(model, ALONE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=moved)
    return system, model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contexts")
    documents(folder / "documents")
    return folder


def test_before_training_a_model_is_its_own_baseline(folder: Path) -> None:
    system, model = made(small(folder))
    found = system.evaluate(model, system.phases(model)[0], ONE).scalars
    for name in ("effective_rank/random_init_{}", "effective_rank/{}"):
        assert all(found[name.format(side)] > 0 for side in ("train", "val"))
    assert found["effective_rank/random_init_val"] == pytest.approx(found["effective_rank/val"])
    assert found["effective_rank/published_init_val"] != pytest.approx(found["effective_rank/val"], rel=1e-3)
    assert found["final_diff/random_init"] == pytest.approx(found["final_diff"])
    for name in ("converged", "converged_val", "start_distance", "start_distance_val"):
        # Of all the tokens, not of some rows, and by the same rule: to the last token.
        assert found[f"{name}/random_init"] == pytest.approx(found[name], abs=1e-9), name
        assert f"{name}/gaussian" in found
    moved = made(small(folder), moved=0.3)
    other = moved[0].evaluate(moved[1], moved[0].phases(moved[1])[0], ONE).scalars
    same = [name for name in found if "_init" in name or "gaussian" in name]
    assert {name: other[name] for name in same} == pytest.approx({name: found[name] for name in same})
    assert other["effective_rank/val"] != pytest.approx(found["effective_rank/val"], rel=1e-3)


def test_a_model_as_published_is_the_published_baseline(folder: Path) -> None:
    system, model = made(small(folder, model__as_published=True))
    found = system.evaluate(model, system.phases(model)[0], ONE).scalars
    for name in ("effective_rank/published_init_val", "effective_rank/random_init_val"):
        assert found[name] == pytest.approx(found["effective_rank/val"])


def test_the_convergence_of_untrained_weights_is_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, model = made(small(folder), moved=0.3)
    calls = []

    def counted(*words: Any) -> dict[str, float]:
        calls.append(words)
        return convergence(*words)

    monkeypatch.setattr(contexts, "convergence", counted)
    first = system.phases(model)[0]
    in_training = [system.evaluate(model, first, ONE).scalars for _ in range(2)]
    # Training and held-out documents of the weights that the run begins with; the published ones are the suite's.
    assert len(calls) == 2 and in_training[0] == in_training[1]
    assert "converged/published_init" not in in_training[0]
    suites = [system.context_suite(model, first, ONE, None).scalars for _ in range(2)]
    assert len(calls) == 4 and suites[0]["converged_val/published_init"] == suites[1]["converged_val/published_init"]
    # All training tokens, whose share has as many steps.
    share = suites[0]["converged/random_init"] * system.contexts.measures.reading.available(training=True)
    assert share == pytest.approx(round(share), abs=1e-6)


def reference_nats(model: nn.Module, tokens: torch.Tensor, *, zero: bool) -> float:
    """Token after token, in float64."""
    double: Any = model.double()
    context, nats = torch.zeros(1, 1, 8, dtype=torch.float64), 0.0
    for token, label in pairwise(tokens):
        given = torch.zeros_like(context) if zero else context
        embedded = double.norm_embed(double.embedding(token[None, None]))
        context, state = double.blocks(given, embedded)
        nats -= float(torch.log_softmax(double.head.weight @ state[0, 0] + double.head.bias, -1)[label])
    return nats


@torch.no_grad()
def test_nats_are_those_of_the_tokens_one_after_the_other(folder: Path) -> None:
    system, model = made(small(folder), moved=0.3)
    reading = system.contexts.measures.reading
    found = nats_by_row(model, 8, reading, ONE, with_context=True)
    without = nats_by_row(model, 8, reading, ONE, with_context=False)
    held_out = [system.documents.document(index) for index in reading.indices(training=False)]
    texts = [torch.from_numpy(one[:12].astype("int64")) for one in held_out]
    assert found[LABELS].tolist() == [len(one) - 1 for one in texts]
    for name, sums, zero in ((MODEL, found, False), (ABLATED, found, True), (MODEL, without, True)):
        expected = [reference_nats(model, one, zero=zero) for one in texts]
        assert sums[name].tolist() == pytest.approx(expected, rel=1e-5), name
    counts = torch.ones(system.documents.vocab, dtype=torch.float64)
    for index in reading.indices(training=True):
        for token in system.documents.document(index).tolist():
            counts[token] += 1
    unigram = -(counts / counts.sum()).log()
    assert found[UNIGRAM].tolist() == pytest.approx([float(unigram[one[1:]].sum()) for one in texts])


def test_the_suite_has_the_criteria_and_a_control_of_the_same_labels(folder: Path) -> None:
    system, model = made(small(folder), moved=0.3)
    first, second = system.phases(model)
    model.train()
    of_first = system.context_suite(model, first, ONE, None)
    assert "prediction/ppl_model" not in of_first.scalars and model.training
    rows = {row["criterion"]: row for row in of_first.tables[CRITERIA]}
    converged = rows["converged training tokens"]
    assert converged["value"] == of_first.scalars["converged"] and converged["random_init"] is not None
    assert converged["wanted"] == ">= 1" and rows["token two back, context / embedding"]["published_init"] is not None
    control, other = made(small(folder, prediction__context="zero"), moved=0.3)
    found = system.context_suite(model, second, ONE, (control, other)).scalars
    # The same weights, so that a control is no other than the ablation.
    assert found["prediction/ratio_control"] == pytest.approx(found["prediction/ratio_context_zero"])
    assert found["prediction/ppl_model"] == pytest.approx(math.exp(found["loss"]), rel=1e-5)
    assert found["prediction/ppl_unigram"] == pytest.approx(found["unigram_ppl"], rel=1e-6)
    assert found["prediction/accuracy_model"] == pytest.approx(found["accuracy"]) and found["accuracy"] > 0
    assert found["prediction/accuracy_unigram"] == pytest.approx(found["unigram_accuracy"])
    assert found["prediction/accuracy_control"] == found["prediction/accuracy_context_zero"]


def test_criteria_are_judged_where_the_phase_ends(folder: Path) -> None:
    system, model = made(small(folder, model__test=True, fixed_point__converged=1.0), moved=0.3)
    first = system.phases(model)[0]
    loader = system.loader(first, ALONE)
    for step in range(first.steps + 1):
        found = system.evaluate(model, first, ONE)
        assert (CRITERIA in found.tables) == (step == first.steps or (step > 0 and found.scalars["converged"] == 1))
        assert ("criteria: " in system.headline(found)) == (CRITERIA in found.tables)
        loader.next_step()
