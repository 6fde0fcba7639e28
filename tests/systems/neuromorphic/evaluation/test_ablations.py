"""Ablations: each way is read as it says, on the same text, with states of its own."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.data.batch import IGNORED
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.systems.neuromorphic.evaluation.ablations import (
    ALL,
    BOTH,
    NOTHING,
    ablate,
    ablation_summary,
    ablations_of,
    of_another,
)
from pipeline.systems.neuromorphic.facts import FactsLoader
from pipeline.systems.neuromorphic.facts_config import FactsConfig
from pipeline.systems.neuromorphic.state import EpisodicState, ProceduralState, StreamState, Uses

TASK = FactsConfig(facts=2, within=2, least_distance=8, least_tokens=30, most_tokens=40)
COSTS = {"working": 1.0, "procedural": 0.25, "episodic": 0.5}


class Arithmetic(nn.Module):
    """A stand-in whose memories are sums: of the ids that a stream has read. A label costs what is missing: a constant
    for an empty memory, and half of it for one with the contents of another stream."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[Uses, int]] = []

    def forward(
        self,
        ids: Any,
        labels: Any,
        segments: Any,
        positions: Any,
        state: StreamState | None,
        uses: Uses,
        **options: Any,
    ) -> Any:
        self.calls.append((uses, ids.shape[1]))
        rows = ids.shape[0]
        if state is None:
            zeros = torch.zeros(rows)
            state = StreamState(zeros, zeros, zeros, None, ProceduralState(*[zeros] * 5), EpisodicState(*[zeros] * 3))
        own = state.hidden
        cost = torch.zeros(rows)
        for memory in ("procedural", "episodic"):
            held = getattr(state, memory).keys
            if getattr(uses, memory) == "empty":
                cost = cost + COSTS[memory]
            elif getattr(uses, memory) == "on":
                cost = cost + COSTS[memory] / 2 * (held != own)
        cost = cost + COSTS["working"] * (uses.working == "empty")
        after = own + ids.sum(1)
        written: dict[str, Any] = {
            "procedural": ProceduralState(*[after] * 5), "episodic": EpisodicState(*[after] * 3)
        }  # fmt: skip
        return SimpleNamespace(
            losses=(1 + cost)[:, None] * (labels != IGNORED),
            predictions=torch.where((cost > 0)[:, None], ids, labels),
            state=dataclasses.replace(state, hidden=after, **written),
        )


def found(uses: Uses, rows: int = 3, steps: int = 2) -> tuple[dict[str, float], Arithmetic]:
    model = Arithmetic()
    loader = FactsLoader(TASK, sequence_length=32, batch_size=rows, held_out=True)
    evaluations = ablate(model, loader, steps, 8, uses, SyncPoint(Topology()))
    return {name: evaluation.scalars["loss"] for name, evaluation in evaluations.items()}, model


def test_right_answers_of_facts_are_those_of_each_way() -> None:
    """The stand-in answers every question while it lacks nothing, and none while it does."""
    loader = FactsLoader(TASK, sequence_length=32, batch_size=3, held_out=True)
    evaluations = ablate(Arithmetic(), loader, 2, 8, Uses(), SyncPoint(Topology()))
    right = {name: evaluation.scalars["facts_right"] for name, evaluation in evaluations.items()}
    assert right.pop(NOTHING) == 1
    # In its first span a stream has nothing that could be swapped, and asks for nothing.
    assert set(right.values()) == {0.0}
    assert all("facts_right_later" not in evaluation.scalars for evaluation in evaluations.values())


@pytest.mark.parametrize("lifelong", [False, True])
def test_every_memory_is_emptied_and_swapped(lifelong: bool) -> None:
    losses, model = found(Uses(lifelong=lifelong))
    swapped = {"own PM": 0.125, "own EM": 0.25}
    expected = {NOTHING: 0.0, "WM": 1.0, "PM": 0.25, "EM": 0.5, BOTH: 0.75, ALL: 1.75}
    for name, cost in expected.items():
        assert losses[name] == pytest.approx(1 + cost)
    # Only in the first of the eight spans does no stream have anything that could be swapped.
    for name, cost in swapped.items():
        assert 1 + 0.8 * cost < losses[name] < 1 + cost
    assert set(losses) == {*expected, *swapped}
    assert all(tokens == 8 and uses.lifelong == lifelong for uses, tokens in model.calls)


def test_a_phase_without_episodic_memory_has_none_to_empty() -> None:
    losses, model = found(Uses(episodic="absent"))
    assert losses.keys() == {NOTHING, "WM", "PM", ALL, "own PM"}
    assert losses[ALL] == pytest.approx(2.25)
    assert all(uses.episodic == "absent" for uses, _ in model.calls)
    assert [way.name for way in ablations_of(Uses(episodic="absent"))] == list(losses)


def test_one_stream_has_nothing_to_swap_with() -> None:
    losses, _ = found(Uses(), rows=1)
    assert losses.keys() == {NOTHING, "WM", "PM", "EM", BOTH, ALL}


def test_a_row_reads_the_memory_of_the_row_before_it() -> None:
    memory = EpisodicState(torch.arange(3.0), torch.arange(3.0) + 10, torch.arange(3.0) + 20)
    other = of_another(memory)
    assert other.keys.tolist() == [2, 0, 1] and other.values.tolist() == [12, 10, 11]
    assert other.strengths.tolist() == [22, 20, 21]
    assert memory.keys.tolist() == [0, 1, 2]


def test_the_summary_has_the_names_of_the_reference() -> None:
    evaluations = ablate(
        Arithmetic(), FactsLoader(TASK, sequence_length=32, batch_size=2), 1, 8, Uses(), SyncPoint(Topology())
    )
    summary = ablation_summary(evaluations)
    assert summary["ablate_ppl_normal"] == pytest.approx(math.e)
    assert summary["ablate_ppl_plasticity_off"] == pytest.approx(math.exp(1.75))
    assert summary["ablate_gap"] == pytest.approx(math.exp(1.75) - math.e)
    assert summary["ablate_cost_wm"] == pytest.approx(1) and summary["ablate_cost_pm_and_em"] == pytest.approx(0.75)
    assert 0 < summary["ablate_cost_em_swapped"] < 0.5
    alone = ablation_summary({name: evaluations[name] for name in (NOTHING, "PM")})
    assert alone["ablate_ppl_plasticity_off"] == pytest.approx(math.exp(1.25))
