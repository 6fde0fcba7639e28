"""What the engine is told of a step: losses and what they average over, metrics, held-out numbers, compiled layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.capabilities import Ablates, Compiles, CountsParts, Generates, Samples, ScoresText
from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import StepContext, System
from pipeline.update_events import NamesEvents, UpdateEvents
from tests.systems.neuromorphic.harness import created, documents, small

CONTEXT = StepContext(Topology(), 0, "B", 1)


@pytest.fixture
def system(tmp_path: Path) -> System[Any]:
    documents(tmp_path / "documents")
    return created(small(tmp_path))


def built(system: System[Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    model = system.build()
    system.initialise(model, Topology())
    return model.to(dtype)


def steps(system: System[Any], model: nn.Module, count: int) -> list[TokenBatch]:
    loader = system.loader(system.phases(model)[1], Topology())
    return [batch for _ in range(count) for batch in loader.next_step()]


def test_the_system_can_do_what_the_engine_may_ask(system: System[Any]) -> None:
    for capability in (Ablates, Compiles, CountsParts, Generates, Samples, ScoresText):
        assert isinstance(system, capability), capability


def test_every_target_counts_once(system: System[Any]) -> None:
    """Over steps, the labels of a stream are all of its tokens but the first of each document."""
    model = built(system)
    batches = steps(system, model, 6)
    losses = []
    for batch in batches:
        output = system.forward(model, batch, {}, CONTEXT)
        counts = system.count(batch)
        assert counts == {"cross_entropy": int((batch.labels != IGNORED).sum()), "strengths": batch.rows}
        assert torch.count_nonzero(output.tokens["losses"]) == counts["cross_entropy"]
        torch.testing.assert_close(output.sums["cross_entropy"], output.tokens["losses"].sum())
        losses.append(counts["cross_entropy"])
    ids = torch.cat([batch.input_ids for batch in batches], 1)
    labels = torch.cat([batch.labels for batch in batches], 1)
    segments = torch.cat([batch.segment_ids for batch in batches], 1)
    goes_on = segments[:, 1:] == segments[:, :-1]
    assert torch.equal(labels[:, :-1][goes_on], ids[:, 1:][goes_on]), "also where a step ends"
    assert bool((labels[:, :-1][~goes_on] == IGNORED).all())


def test_rows_are_apart_and_add_up(system: System[Any]) -> None:
    """Two halves of a batch give what the whole does, losses, penalties and what the streams carry."""
    model = built(system)
    first, second = steps(system, model, 2)
    halves = [slice(0, 2), slice(2, 4)]

    def run(rows: slice) -> list[Any]:
        carry: Any = {}
        found = []
        for batch in (first, second):
            part = TokenBatch(*(getattr(batch, name)[rows] for name in TokenBatch.__dataclass_fields__))
            found.append(system.forward(model, part, carry, CONTEXT))
            carry = found[-1].carry
        return found

    whole, parts = run(slice(0, 4)), [run(rows) for rows in halves]
    for step in range(2):
        for term, value in whole[step].sums.items():
            torch.testing.assert_close(sum(part[step].sums[term] for part in parts), value, rtol=1e-9, atol=1e-9)
    for name, entry in whole[1].carry.items():
        joined = torch.cat([part[1].carry[name].tensor for part in parts])
        torch.testing.assert_close(joined, entry.tensor, rtol=1e-9, atol=1e-9)


def test_phases_use_the_memories_differently(system: System[Any]) -> None:
    model = built(system)
    batches = steps(system, model, 6)
    found = {}
    for phase in "ABC":
        carry: Any = {}
        for batch in batches:
            carry = system.forward(model, batch, carry, StepContext(Topology(), 0, phase, 1)).carry
        found[phase] = carry["episodic.strengths"].tensor
    assert not found["A"].any() and found["B"].any()
    # Documents ended on the way: what was written in them is there in lifelong mode alone.
    assert bool((found["C"].sum((1, 2)) > found["B"].sum((1, 2))).any())


def test_measures_are_there_where_they_are_asked_for(system: System[Any]) -> None:
    model = built(system)
    batch = steps(system, model, 1)[0]
    light = system.forward(model, batch, {}, CONTEXT).metrics
    heavy = system.forward(model, batch, {}, StepContext(Topology(), 0, "B", 1, heavy_metrics=True)).metrics
    assert {"valid_fraction", "reset_fraction", "reg"} <= set(light) < set(heavy)
    assert "pm_commit_rate_mean" in heavy and "em_gain_mean" in heavy
    assert all(torch.isfinite(total) and count > 0 for total, count in heavy.values())


@pytest.mark.parametrize("phase", ["A", "B", "C"])
def test_an_evaluation_says_what_it_read_and_with_which_memories(system: System[Any], phase: str) -> None:
    model = built(system, torch.float32)
    chosen = next(found for found in system.phases(model) if found.name == phase)
    found = system.evaluate(model, chosen, SyncPoint(Topology())).scalars
    assert (found["pm_enabled"], found["em_enabled"], found["steps_done"]) == (1, phase != "A", 2)
    loader = system.held_out(chosen, Topology())
    steps = [loader.next_step()[0] for _ in range(2)]
    ids, labels, segments = (
        torch.cat([getattr(batch, name) for batch in steps], 1) for name in ("input_ids", "labels", "segment_ids")
    )
    before = torch.cat([torch.full_like(segments[:, :1], -1), segments[:, :-1]], 1)
    assert found["valid_fraction"] == pytest.approx(found["labels"] / ids.numel())
    assert found["valid_fraction"] == pytest.approx(float((labels != IGNORED).double().mean()))
    assert found["reset_fraction"] == pytest.approx(float((before != segments).double().mean()))
    assert found["eot_input_fraction"] == pytest.approx(float((ids == system.end_of_document()).double().mean()))
    assert found["eot_input_fraction"] > 0


def test_events_of_updates_have_the_names_of_the_reference(system: System[Any]) -> None:
    assert isinstance(system, NamesEvents)
    found = system.event_metrics(UpdateEvents(0.5, 2, 7))
    assert found == {"warn_high_grad_norm": 0.5, "nan_grad_steps": 2, "stream_restarts_total": 7}
    assert "stream_restarts_total" not in system.event_metrics(UpdateEvents(0.5, 2, None))


def test_held_out_numbers_come_again_and_leave_the_model_alone(system: System[Any]) -> None:
    model = built(system, torch.float32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    phase = system.phases(model)[1]
    first, again = (system.evaluate(model, phase, SyncPoint(Topology())).scalars for _ in range(2))
    assert first == again and {"loss", "ppl", "bpb", "labels"} <= set(first)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "val" in system.headline(system.evaluate(model, phase, SyncPoint(Topology())))


def test_layers_are_single_graphs_with_the_same_losses(system: System[Any]) -> None:
    """As `--compile` has them, but for the code that is generated, which takes a minute."""
    model = built(system)
    batch = steps(system, model, 1)[0]
    plain = system.forward(model, batch, {}, CONTEXT).sums["cross_entropy"]
    assert isinstance(system, Compiles)
    system.check_compile(Topology())
    blocks = system.blocks(model)
    assert len(blocks) == 2
    for block in blocks:
        block.compile(backend="eager", fullgraph=True, dynamic=False)
    compiled = system.forward(model, batch, {}, CONTEXT).sums["cross_entropy"]
    torch.testing.assert_close(compiled, plain, rtol=1e-10, atol=1e-10)
    compiled.backward()
    assert model.layers[0].gates.weight.grad is not None  # type: ignore[index,union-attr]


def test_what_is_said_of_a_run(system: System[Any]) -> None:
    said = system.describe("cpu", torch.float32)
    assert "2 columns of 2 layers" in said["model"] and "credit through 16 tokens" in said["memories"]
    assert system.flops(16, None).total > system.flops(16, system.phases(system.build())[0]).total > 0
    parts = system.parameter_parts()  # type: ignore[attr-defined]
    assert sum(parts.values()) == sum(parameter.numel() for parameter in system.build().parameters())
