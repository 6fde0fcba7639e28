"""Which text a phase reads: sets by name, a source of the user's own, and documents that no other phase reads."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.commands.flags import parse_run
from pipeline.config import RunConfig
from pipeline.data.batch import StatefulLoader, TokenBatch
from pipeline.data_config import RecallConfig, mix_weights
from pipeline.errors import UserError
from pipeline.lm.held_out import run_held_out
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import create_system
from pipeline.systems.neuromorphic import data
from pipeline.systems.neuromorphic.config import PHASES
from pipeline.systems.neuromorphic.data import DCLM, FINEWEB, SETS, TINY_STORIES, phase_data
from pipeline.systems.neuromorphic.facts import EOS, FactsBatch, FactsLoader
from pipeline.systems.neuromorphic.facts_config import FactsConfig
from pipeline.systems.neuromorphic.system import NeuromorphicSystem
from tests.systems.neuromorphic.harness import created, documents, small

STEPS, NAME = 3, 4
"""Of a phase, few enough for one reading of the documents; and characters of the name of a document."""
MIX = (f"{FINEWEB}=0.6", f"{DCLM}=0.4")


def parsed(*words: str) -> RunConfig:
    return parse_run(["neuromorphic", "--preset", "phase_a_to_c", *words], "train")


def sources(config: RunConfig, *, held_out: bool = False) -> list[object]:
    sections = [phase_data(config, phase, held_out=held_out) for phase in PHASES]
    return [section.dataset or section.mix or section.path for section in sections]


def test_each_phase_reads_its_set() -> None:
    config = parsed()
    assert sources(config) == sources(config, held_out=True) == [TINY_STORIES, MIX, MIX]
    tokenizer = phase_data(config, "B").tokenizer
    assert tokenizer == phase_data(parsed(), "A").tokenizer == config.data.tokenizer
    assert phase_data(parsed("--tokenizer", "gpt2"), "B").tokenizer == "gpt2"


def test_a_set_is_chosen_for_all_phases() -> None:
    assert sources(parsed("--data-phase", "A")) == [TINY_STORIES] * 3
    config = parsed("--data-phase", "B", "--val-data-phase", "A")
    assert sources(config) == [MIX] * 3 and sources(config, held_out=True) == [TINY_STORIES] * 3
    own = parsed("--data-phase", "B", "--data.path", "my_texts")
    assert sources(own) == sources(own, held_out=True) == [("my_texts",)] * 3
    with pytest.raises(UserError, match="data-phase"):
        parsed("--data-phase", "Z")


@pytest.mark.parametrize("name", SETS)
def test_every_set_of_the_guides_has_a_name(name: str) -> None:
    config = parsed("--data-phase", name)
    section = phase_data(config, "A")
    assert sources(config) == [SETS[name].get("dataset") or SETS[name]["mix"]] * 3  # type: ignore[index]
    if section.mix:
        assert sum(mix_weights(section.mix).values()) == pytest.approx(1)


def test_held_out_documents_are_no_training_documents_of_any_phase(tmp_path: Path) -> None:
    documents(tmp_path / "documents")
    system = created(small(tmp_path, sequence_length=64))
    with torch.device("meta"):
        phases = system.phases(system.build())
    texts = {}
    for side, open_loader in (("training", system.loader), ("held out", system.held_out)):
        loader = open_loader(phases[0], Topology())
        texts[side] = {
            document.text
            for document in loader._documents.scan()  # the whole corpus of this side
        }
    assert texts["training"] and texts["held out"] and not texts["training"] & texts["held out"]
    # The loader of one phase goes on where that of the one before stood.
    assert [phase.keep_carry for phase in phases] == [False, True, True]


def read(loader: StatefulLoader[TokenBatch], steps: int) -> tuple[set[str], set[str], dict[str, Any]]:
    """Of some steps, the documents that begin and those that go on, as far as read; and the loader's state."""
    batches = [batch for _ in range(steps) for batch in loader.next_step()]
    begun: set[str] = set()
    going_on: set[str] = set()
    parts = ("input_ids", "segment_ids", "positions")
    joined = [torch.cat([getattr(batch, name) for batch in batches], 1) for name in parts]
    for ids, segments, positions in zip(*joined, strict=True):
        for segment in segments.unique():
            here = segments == segment
            text = bytes(ids[here][ids[here] < 256].tolist()).decode()
            (begun if positions[here][0] == 0 else going_on).add(text)
    return begun, going_on, loader.state_dict()


@pytest.mark.parametrize("own_sets", [False, True], ids=["one set", "sets of the phases"])
def test_no_document_begins_in_two_phases_or_is_evaluated(
    own_sets: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the engine opens them: the loader of a phase that goes on gets the place of the one before."""
    changes: dict[str, Any] = {"sequence_length": 64}
    if own_sets:
        folders = {name: numbered(tmp_path / name, name) for name in "XYZ"}
        sets = {"A": {"path": (folders["X"],)}, "B": {"mix": (f"{folders['Y']}=0.6", f"{folders['Z']}=0.4")}}
        monkeypatch.setattr(data, "SETS", sets)
        changes["data__path"] = ()
    else:
        changes["data__path"] = (numbered(tmp_path / "W", "W"),)
    system = created(small(tmp_path, **changes))
    with torch.device("meta"):
        phases = system.phases(system.build())
    assert [phase.keep_carry for phase in phases] == [False, not own_sets, True]
    begun: dict[str, set[str]] = {}
    held_out: set[str] = set()
    place: dict[str, Any] = {}
    for phase in phases:
        loader = system.loader(phase, Topology())
        if phase.keep_carry:
            loader.load_state_dict(place)
        begun[phase.name], going_on, place = read(loader, STEPS)
        assert len(names_of(begun[phase.name])) > 15
        assert bool(going_on) == phase.keep_carry, "what a phase was reading at its end, the next reads on"
        evaluated, _, _ = read(system.held_out(phase, Topology()), STEPS)
        held_out |= evaluated
    names = {phase: names_of(texts) for phase, texts in begun.items()}
    for one, other in itertools.combinations("ABC", 2):
        assert not names[one] & names[other], (one, other)
    assert len(names_of(held_out)) > 10
    assert not names_of(held_out) & set.union(*names.values())


def test_later_phases_from_weights_alone_read_on_behind_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The position is the checkpoint's where data and streams are; else the log says why it is not."""
    changes = {"data__path": (numbered(tmp_path / "W", "W"),), "sequence_length": 64}
    weights = tmp_path / "weights"
    first = created(small(tmp_path, **changes, phases=("A", "B")))
    with torch.device("meta"):
        phases = {phase.name: phase for phase in first.phases(first.build())}
    loader = first.loader(phases["B"], Topology())
    begun, _, place = read(loader, STEPS)
    expected = [batch.input_ids for batch in loader.next_step()]
    monkeypatch.setattr(data, "read_loader_state", lambda folder: place if folder == weights else {})
    monkeypatch.setattr(NeuromorphicSystem, "_check_beginning", lambda self: None)

    def opened(phase: str, **more: Any) -> tuple[StatefulLoader[TokenBatch], str]:
        system = created(small(tmp_path, **changes, init_from=weights, **more))
        found = system.loader(phases[phase], Topology())
        return found, system.describe("cpu", torch.float32).get("data begins", "")

    loader, said = opened("C", phases=("C",))
    assert said == f"behind what {weights} has read"
    assert all(map(torch.equal, expected, [batch.input_ids for batch in loader.next_step()]))
    later, _, _ = read(loader, STEPS - 1)
    assert later and not names_of(later) & names_of(begun)
    loader, said = opened("C", phases=("C",), seed=1)
    assert said.startswith(f"from the start, which {weights} has read too") and "(seed)" in said
    # A run that begins with phase A begins its data, and a later phase of a run is moved by the engine.
    for phase, run in (("A", ("A", "B")), ("C", ("B", "C"))):
        loader, said = opened(phase, phases=run)
        again, _, _ = read(loader, STEPS)
        assert said == "" and again == begun
    # Of other documents there is no position.
    changes["data__path"] = (numbered(tmp_path / "V", "V"),)
    assert opened("C", phases=("C",))[1] == ""


def numbered(folder: Path, name: str, count: int = 200) -> str:
    """A folder of short documents that begin with a name of their own."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03d}.txt").write_text(f"{name}{number:0{NAME - 1}d} " + "word " * (number % 5))
    return str(folder)


def names_of(texts: set[str]) -> set[str]:
    """Of documents that were read as far as their names."""
    return {text[:NAME] for text in texts if len(text) >= NAME}


def test_the_vocabulary_is_that_of_what_is_read(tmp_path: Path) -> None:
    documents(tmp_path / "documents")
    assert created(small(tmp_path, model__vocab=999)).sizes.vocab == 260
    task = RecallConfig(keys=16, values=16, fillers=16, pairs=2, queries=2, max_gap=80)
    config = small(tmp_path, data__path=(), data__recall=task, sequence_length=128)
    system = created(config)
    assert system.sizes.vocab == task.vocab_size and system.eos_id is None
    with pytest.raises(UserError, match="ids stand for no text"):
        system.tokenizer()


TASK = FactsConfig(
    keys=12, values=4, fillers=4, facts=2, within=1, documents=1, least_distance=14, least_tokens=26, most_tokens=30
)


def facts_run(folder: Path, **changes: Any) -> RunConfig:
    return small(folder, **({"data__path": (), "model__facts": TASK} | changes))


def test_facts_are_read_in_place_of_documents(tmp_path: Path) -> None:
    """Of each phase its own, held out others, with the vocabulary of the task; no text is behind the ids."""
    system = created(facts_run(tmp_path, sequence_length=64))
    assert system.list_data() == {} and system.sizes.vocab == TASK.vocab and system.eos_id == EOS
    assert system.byte_lengths() is None
    with pytest.raises(UserError, match="trained on the facts task, whose ids stand for no text"):
        system.tokenizer()
    with torch.device("meta"):
        phases = system.phases(system.build())
    # The questions of a phase are others than those before: it begins with empty streams.
    assert not any(phase.keep_carry for phase in phases)
    read = {}
    for phase in phases:
        for side, open_loader in (("training", system.loader), ("held out", system.held_out)):
            loader = open_loader(phase, Topology())
            assert isinstance(loader, FactsLoader) and loader.config == TASK.of_phase(phase.name)
            (batch,) = loader.next_step()
            assert isinstance(batch, FactsBatch) and batch.rows == system.config.batch_size
            read[phase.name, side] = batch.input_ids
        assert not torch.equal(read[phase.name, "training"], read[phase.name, "held out"])
        # An evaluation begins anew.
        (again,) = system.held_out(phase, Topology()).next_step()
        assert torch.equal(again.input_ids, read[phase.name, "held out"])
    rows = created(facts_run(tmp_path, sequence_length=64, evaluation__batch_size=2, grad_accum=3))
    assert [batch.rows for batch in rows.held_out(phases[0], Topology()).next_step()] == [2]
    assert [batch.rows for batch in rows.loader(phases[0], Topology()).next_step()] == [4, 4, 4]


@pytest.mark.parametrize(
    "source", [{"data__path": ("documents",)}, {"data__dataset": "stdlib"}, {"data__recall": RecallConfig()}]
)
def test_facts_and_documents_are_not_both_read(source: dict[str, Any], tmp_path: Path) -> None:
    system = create_system(facts_run(tmp_path, **source))
    name = next(iter(source)).removeprefix("data__")
    with pytest.raises(UserError, match=f"--data.{name}: facts are read in place of documents: leave it out, or"):
        system.settled(Topology())


@pytest.mark.parametrize("phase, names", [("B", {"facts_right"}), ("C", {"facts_right", "facts_right_later"})])
def test_an_evaluation_counts_right_answers(phase: str, names: set[str], tmp_path: Path) -> None:
    """As those of the predictions themselves, and in the headline."""
    system = created(facts_run(tmp_path, sequence_length=64, evaluation__steps=3))
    model = system.build()
    system.initialise(model, Topology())
    chosen = next(p for p in system.phases(model) if p.name == phase)
    sync_point = SyncPoint(Topology())
    found = system.evaluate(model, chosen, sync_point)
    right = {name: value for name, value in found.scalars.items() if name.startswith("facts_right")}
    assert right.keys() == names
    batches = run_held_out(system, model, chosen, sync_point, {"uses": system.uses(phase), "predict": True})
    for name, asks in {"facts_right": lambda lag: lag == 0, "facts_right_later": lambda lag: lag > 0}.items():
        if name in names:
            pairs = [(predicted == batch.labels)[asks(batch.documents)] for batch, _, predicted in batches]
            assert right[name] == pytest.approx(float(torch.cat(pairs).float().mean()))
            assert f"{name.replace('_', ' ')} {right[name]:.1%}" in system.headline(found)
