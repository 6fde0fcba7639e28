"""What a system need not write: the defaults of the base class."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.capabilities import Ablates, Samples
from pipeline.config import EvaluationConfig, ModelConfig, RunConfig
from pipeline.data.batch import Counts
from pipeline.host.devices import DEVICES
from pipeline.parallel.topology import Topology
from pipeline.runtime.stop import Stopped, StopRequests
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, CarryEntry, Evaluation, Phase, StepContext, StepOutput, System

PHASE = Phase("train", 1, ())


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A batch that is no text: x [rows, 3]."""

    x: Tensor

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    def to(self, device: torch.device) -> Numbers:
        return Numbers(self.x.to(device))


class Counting:
    """Step n has two micro-batches of n ones each, in rows of three."""

    def __init__(self) -> None:
        self.step = 0

    def next_step(self) -> list[Numbers]:
        self.step += 1
        return [Numbers(torch.full((self.step, 3), 1.0)) for _ in range(2)]

    def describe(self) -> str:
        return "ones"

    def reset(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "fingerprint": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class Adder(System[Numbers]):
    """Costs what its numbers add up to, and a second term what the steps carry."""

    name = "adder"

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 50, bias=False))

    def initialise(self, model: nn.Module, topology: Topology) -> None:
        raise AssertionError("not asked for here")

    def phases(self, model: nn.Module) -> Sequence[Phase]:
        return [PHASE]

    def loader(self, phase: Phase, topology: Topology) -> Counting:
        return Counting()

    def held_out(self, phase: Phase, topology: Topology) -> Counting:
        return Counting()

    def count(self, batch: Numbers) -> Counts:
        return {"numbers": batch.x.numel(), "steps": 1}

    def forward(self, model: nn.Module, batch: Numbers, carry: Carry, context: StepContext) -> StepOutput:
        assert not model.training and not torch.is_grad_enabled()
        past = carry["past"].tensor if carry else torch.zeros(())
        return StepOutput({"numbers": 5 * batch.x.sum(), "steps": past}, {"past": CarryEntry(past + 1)})


def adder(steps: int) -> Adder:
    evaluation = EvaluationConfig(steps=steps)
    return Adder(RunConfig("", ModelConfig(), steps=1, batch_size=1, sequence_length=8, lr=1.0, evaluation=evaluation))


def test_the_held_out_loss_is_the_mean_of_each_term_over_all_steps_added_up() -> None:
    model = nn.Linear(1, 1).train()
    evaluation = adder(3).evaluate(model, PHASE, SyncPoint(Topology()))
    # Both micro-batches carry 0, 1 and 2 into the three steps.
    assert evaluation.scalars == pytest.approx({"loss": 5 + 1, "loss/numbers": 5, "loss/steps": 1})
    assert evaluation.curves == {} and model.training


def test_one_term_is_the_loss_and_is_not_repeated() -> None:
    class Single(Adder):
        def count(self, batch: Numbers) -> Counts:
            return {"numbers": batch.x.numel()}

        def forward(self, model: nn.Module, batch: Numbers, carry: Carry, context: StepContext) -> StepOutput:
            return StepOutput({"numbers": (context.step * batch.x).sum()}, {})

    scalars = Single(adder(2).config).evaluate(nn.Linear(1, 1), PHASE, SyncPoint(Topology())).scalars
    assert scalars == pytest.approx({"loss": (1 * 3 + 2 * 6) / (3 + 6)})


def test_a_stop_ends_a_held_out_evaluation_and_leaves_the_model_in_training() -> None:
    model, requests = nn.Linear(1, 1).train(), StopRequests()
    requests.max_hours = 0
    with pytest.raises(Stopped):
        adder(3).evaluate(model, PHASE, SyncPoint(Topology(), requests))
    assert model.training


def test_flops_are_six_for_every_element_of_a_matrix_that_is_applied() -> None:
    flops = adder(1).flops(8)
    assert (flops.forward, flops.backward) == (2 * (4 * 6 + 6 * 50), 4 * (4 * 6 + 6 * 50))

    class Tied(Adder):
        def build(self) -> nn.Module:
            model = nn.Sequential(nn.Embedding(50, 6), nn.Linear(6, 50, bias=False))
            model[1].weight = model[0].weight
            return model

    assert Tied(adder(1).config).flops(8).total == 6 * 6 * 50


def test_what_else_a_system_may_leave_out_says_nothing() -> None:
    system = adder(1)
    system.check(Topology(world=4, sequence=2))
    system.after_step(nn.Linear(1, 1), StepContext(Topology(), 0, "train", 1))
    assert system.describe("cpu", torch.float32) == {}
    assert system.activation_bytes(Topology(), 4, DEVICES[0]) == {}
    assert system.caption() == "" and system.files is None and system.token_term == "cross_entropy"
    assert system.token_weight == 1.0


def test_a_system_without_one_of_the_seven_methods_is_refused_as_it_is_made() -> None:
    needed = {"build", "initialise", "phases", "loader", "held_out", "count", "forward"}
    assert System.__abstractmethods__ == needed
    with pytest.raises(TypeError, match="forward"):
        type("Unfinished", (System,), {"name": "unfinished"})(adder(1).config)


def test_a_capability_is_had_by_a_system_that_has_its_method() -> None:
    class Sampling(Adder):
        def samples(self, model: nn.Module, phase: Phase, context: StepContext, sync_point: SyncPoint) -> Sequence[str]:
            return [f"{phase.name} {context.step}"]

        def ablations(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> dict[str, Evaluation]:
            return {"carry off": Evaluation({"loss": math.nan})}

    plain, sampling = adder(1), Sampling(adder(1).config)
    assert isinstance(sampling, Samples) and isinstance(sampling, Ablates)
    assert not isinstance(plain, Samples) and not isinstance(plain, Ablates)
