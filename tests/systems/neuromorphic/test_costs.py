from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.recipes.neuromorphic import neuromorphic, neuromorphic_tiny
from pipeline.systems.neuromorphic.config import TIERS, NeuromorphicConfig, Tier
from pipeline.systems.neuromorphic.costs import activation_bytes, flops, part_flops, state_numbers
from pipeline.systems.neuromorphic.model.model import NeuromorphicModel
from pipeline.systems.neuromorphic.phases import steps_of
from pipeline.systems.neuromorphic.state import Uses
from pipeline.systems.neuromorphic.stream_tensors import named
from pipeline.systems.neuromorphic.weights import PARTS, initialise

SIZES = NeuromorphicConfig(tier="tiny", vocab=64, layers=3, slots=16)
USES = {"A": Uses(episodic="absent"), "B": Uses()}


def tokens(config: NeuromorphicConfig, rows: int, length: int) -> tuple[Tensor, ...]:
    ids = torch.randint(0, config.vocab, (rows, length))
    return ids, ids, torch.zeros_like(ids), torch.arange(length).expand(rows, length)


@pytest.mark.parametrize(
    ("config", "phase"), [(SIZES, "A"), (SIZES, "B"), (dataclasses.replace(SIZES, decoder=False), "B")]
)
def test_flops_are_those_of_the_products_that_a_pass_makes(config: NeuromorphicConfig, phase: str) -> None:
    model = NeuromorphicModel(config)
    initialise(model, 0)
    model.requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*tokens(config, 2, 128), None, USES[phase])
    # Not counted in `flops`: what happens once a span, and the window's blocks beyond the window.
    assert counter.get_total_flops() / 256 == pytest.approx(flops(config, phase).forward, rel=0.06)
    assert flops(config, phase).backward == 2 * flops(config, phase).forward


def test_a_token_of_tier_b_costs_about_what_the_reference_says() -> None:
    config = NeuromorphicConfig()
    assert set(part_flops(config)) == {part for part, _ in PARTS}
    assert flops(config, "B").total == pytest.approx(0.57e9, rel=0.1)
    assert flops(config, "A").total < flops(config, "B").total == flops(config).total


def test_the_page_says_what_a_token_costs_in_each_phase() -> None:
    page = (Path(__file__).parents[3] / "docs" / "neuromorphic.md").read_text().splitlines()
    found = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in page if line.count("|") == len(TIERS) + 2}
    rows: dict[str, list[str]] = {"A": [], "B": [], "mean": []}
    for tier in get_args(Tier):
        run = neuromorphic_tiny() if tier == "tiny" else neuromorphic()
        vocab = 260 if tier == "tiny" else 32000
        costs = {phase: flops(NeuromorphicConfig(tier=tier, vocab=vocab), phase).total for phase in "ABC"}
        assert costs["B"] == costs["C"]
        steps = {phase: steps_of(run, phase) for phase in costs}
        mean = sum(costs[phase] * steps[phase] for phase in costs) / sum(steps.values())
        for row, cost in (("A", costs["A"]), ("B", costs["B"]), ("mean", mean)):
            rows[row].append(f" {cost / 1e9:.3f} ")
    assert found["GFLOP a token, forward and backward, phase A"] == rows["A"]
    assert found["the same, phases B and C"] == rows["B"]
    assert found["the same, mean of all steps, as `plan` prints it"] == rows["mean"]


def saved(config: NeuromorphicConfig, rows: int, length: int, dtype: torch.dtype, phase: str) -> int:
    """Bytes that autograd keeps of a pass, weights left out."""
    model = NeuromorphicModel(config)
    initialise(model, 0)
    model = model.to(dtype)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, tuple[int, Tensor]] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            storages[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model(*tokens(config, rows, length), None, USES[phase])
    assert out.losses is not None
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("phase", USES)
def test_what_a_step_keeps_is_about_what_autograd_saves(phase: str) -> None:
    cases = (
        (SIZES, 2, 128, torch.float32),
        (dataclasses.replace(SIZES, layers=5, columns=4), 1, 64, torch.bfloat16),
        (dataclasses.replace(SIZES, episodes=128, episodic_width=48, decoder_width=128, span=32), 3, 64, torch.float32),
        (dataclasses.replace(SIZES, layers=5, columns=4, decoder=False), 1, 64, torch.bfloat16),
    )
    for config, rows, length, dtype in cases:
        found = activation_bytes(config, rows, length, dtype.itemsize, phase=phase)
        known = saved(config, rows, length, dtype, phase)
        assert found["kept activations"] == pytest.approx(known, rel=0.15)
    less = activation_bytes(SIZES, 2, 256, 4, phase=phase, recompute=True)["kept activations"]
    assert less < 0.4 * activation_bytes(SIZES, 2, 256, 4, phase=phase)["kept activations"]


@torch.no_grad()
def test_the_numbers_of_a_state_are_those_that_a_stream_carries() -> None:
    model = NeuromorphicModel(SIZES)
    initialise(model, 0)
    state = model(*tokens(SIZES, 2, 64)).state
    # Beside them a surprise and a document; ids and positions of the window are int64.
    numbers = sum(x.numel() * (2 if not x.is_floating_point() else 1) for x in named(state).values())
    assert state_numbers(SIZES) == pytest.approx(numbers / 2, abs=3)
