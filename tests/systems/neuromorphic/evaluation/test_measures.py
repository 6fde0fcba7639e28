"""The part of the system that measures: what the engine and the commands ask of it, on a small model of bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline import capabilities
from pipeline.data.tokenizer import ByteTokenizer
from pipeline.inference import generate, load_state, read, save_state
from pipeline.inference.decoded import Decoded
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Phase, StepContext
from pipeline.systems.neuromorphic import samples as sampling
from pipeline.systems.neuromorphic.decoding import NeuromorphicDecoder
from pipeline.systems.neuromorphic.evaluation import measures
from pipeline.systems.neuromorphic.evaluation.measures import Measures
from pipeline.systems.neuromorphic.evaluation.probes import TokenFacts
from pipeline.systems.neuromorphic.facts import FactsLoader
from pipeline.systems.neuromorphic.facts_config import FactsConfig
from pipeline.systems.neuromorphic.state import Uses
from tests.systems.neuromorphic.small import SIZES, small_model

TOKENIZER = ByteTokenizer()
TASK = FactsConfig(facts=2, within=2, fillers=64, least_distance=8, least_tokens=100, most_tokens=140)
CONFIG = dataclasses.replace(SIZES, vocab=TOKENIZER.vocab_size, span=32, window=32)
PHASE = Phase("C", 1, ())


class Measured(Measures):
    """As the system is, without what trains it."""

    reached: str | None = None

    def __init__(self) -> None:
        evaluation = SimpleNamespace(steps=2)
        self.config: Any = SimpleNamespace(evaluation=evaluation, seed=3, model=CONFIG)
        self.sizes = CONFIG

    def uses(self, phase: str) -> Uses:
        return {"A": Uses(episodic="absent"), "B": Uses(), "C": Uses(lifelong=True)}[phase]

    def last_phase(self) -> str:
        return "C"

    def tokenizer(self, makers: Any = None) -> ByteTokenizer:
        return TOKENIZER

    def held_out(self, phase: Phase, topology: Topology) -> Any:
        return FactsLoader(TASK, sequence_length=64, batch_size=4, held_out=True)


class Wrapped(nn.Module):
    """The engine's module, in the engine."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.module(*args, **options)


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(torch.float32, CONFIG)


def test_the_system_can_all_that_is_asked_of_it() -> None:
    system = Measured()
    for name in ("Samples", "Ablates", "SummarisesAblations", "MeasuresGradients", "Generates", "RemembersFacts"):
        assert isinstance(system, getattr(capabilities, name)), name


def test_what_is_measured_in_training_leaves_the_model_as_it_was(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "WRITTEN", 20)
    monkeypatch.setattr(sampling, "TEXTS", 1)
    system, engine = Measured(), Wrapped(model).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    context, sync_point = StepContext(Topology(), 3, "C", 200), SyncPoint(Topology())
    drawn = system.samples(engine, PHASE, context, sync_point)
    assert list(drawn) == ["text_samples"] and len(drawn["text_samples"].texts) == 1  # type: ignore[union-attr]
    batch = system.held_out(PHASE, Topology()).next_step()[0]
    output = engine(batch.input_ids, batch.labels, batch.segment_ids, batch.positions, statistics=True)
    metrics = system.metrics(batch, None, output, context)
    assert {"valid_fraction", "eot_input_fraction", "wm_entropy_mean", "em_g_em_mean_b0"} <= set(metrics)
    said = system.health({name: float(total.detach() / count) for name, (total, count) in metrics.items()})
    assert [part.split()[0] for part in said.split(" | ")[:4]] == ["h", "WM", "PM", "EM"]
    assert system.health({}) == ""
    ablations = system.ablations(engine, PHASE, sync_point)
    assert "own EM" in ablations and "ablate_gap" in system.ablation_summary(ablations)
    assert engine.training and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found = system.lifelong_suite(engine, PHASE, sync_point, streams=1, documents=(1,), lengths=(240,))
    assert found.curves["lifelong_documents"].x == (0, 1) and "lifelong/EM_off/documents_1" in found.scalars
    assert engine.training


def test_a_model_of_facts_is_asked_for_facts_and_draws_no_text(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    system, context = Measured(), StepContext(Topology(), 3, "C", 7)
    task = dataclasses.replace(TASK, fewest=1)
    system.sizes = dataclasses.replace(CONFIG, facts=task)
    asked: list[Any] = []
    monkeypatch.setattr(measures, "TokenFacts", lambda *words: asked.append(words) or TokenFacts(*words))
    found = system.lifelong_suite(model, PHASE, SyncPoint(Topology()), streams=2, documents=(1,))
    assert asked == [(dataclasses.replace(task, fewest=None), 3)], "as many as a document may tell"
    (rows,) = found.tables.values()
    assert {row["chance"] for row in rows} == {1 / task.values}
    assert {row["questions"] for row in rows} == {2 * task.facts}
    assert system.samples(model, PHASE, context, SyncPoint(Topology())) == {}


def test_text_is_generated_with_the_memories_of_the_phase(model: Any, tmp_path: Path) -> None:
    system = Measured()
    decoder = system.decoder(model)
    assert isinstance(decoder, NeuromorphicDecoder) and decoder.uses.lifelong
    system.reached = "A"
    decoded = Decoded(system, model).eval()
    assert decoded.decoder().uses.episodic == "absent"  # type: ignore[attr-defined]
    system.reached = "B"
    options: dict[str, Any] = {"max_new_tokens": 20, "seed": 1}
    text = generate(decoded, TOKENIZER, ["The state of ", "x"], **options)
    assert text == generate(decoded, TOKENIZER, ["The state of ", "x"], **options)
    # What was read is kept in a file, and goes on as the text itself does.
    prompt = "A prompt that is longer than two spans of this model, which are short. "
    kept = tmp_path / "state.safetensors"
    save_state(decoded, read(decoded, TOKENIZER, prompt), kept)
    again = generate(decoded, TOKENIZER, state=load_state(decoded, kept), **options)
    assert again == [generate(decoded, TOKENIZER, prompt, **options)]
    size = kept.stat().st_size
    save_state(decoded, read(decoded, TOKENIZER, prompt * 3), kept)
    assert kept.stat().st_size == size
