"""The phased system: what the engine asks of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.data.batch import Counts, StatefulLoader
from pipeline.host.devices import Device
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import fill, generator_for
from pipeline.runtime.sync import SyncPoint
from pipeline.schedule import Schedule
from pipeline.system import (
    Carry,
    CarryEntry,
    Evaluation,
    Flops,
    ParameterGroup,
    Phase,
    Sample,
    StepContext,
    StepOutput,
    System,
)
from tests.toy_systems.phased import PhasedConfig
from tests.toy_systems.phased.data import TARGETS, WIDTH, Endless, Pairs, epochs

HIDDEN = 6
TERM = "error"


class PhasedModel(nn.Module):
    """A part that no phase trains, and others that some do."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Linear(WIDTH, HIDDEN)
        self.early = nn.Linear(HIDDEN, HIDDEN)
        self.late = nn.Linear(HIDDEN, TARGETS)
        self.extra = nn.Parameter(torch.empty(TARGETS))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("begun", torch.zeros(2))

    def forward(self, inputs: Tensor, targets: Tensor, memory: Tensor) -> Tensor:
        """The summed error; `memory` [rows, 4] is added to every input."""
        given = (inputs + memory[:, None]).to(self.fixed.weight.dtype)
        hidden = torch.tanh(self.early(torch.tanh(self.fixed(given))))
        return (self.late(hidden) * (1 + self.extra) - targets).square().mean(dim=-1).sum()


def group(name: str, *parameters: str, **settings: float) -> ParameterGroup:
    return ParameterGroup(name, parameters, **settings)


class PhasedSystem(System[Pairs]):
    """Three phases of other data, other parameters and other schedules; the first ends by a rule."""

    name = "phased"
    token_term = TERM

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.model, PhasedConfig)
        super().__init__(config)
        self.threshold, self.whole, self.pause = config.model.threshold, config.model.whole, config.model.pause

    def build(self) -> nn.Module:
        return PhasedModel()

    def initialise(self, model: nn.Module, topology: Topology) -> None:
        seed = self.config.seed
        fill(model, lambda name, shape: 0.5 * torch.randn(shape, generator=generator_for(seed, name)))

    def phases(self, model: nn.Module) -> Sequence[Phase]:
        steps, decay, threshold = self.config.steps, self.config.weight_decay, self.threshold
        least = self.config.model.evaluated  # type: ignore[attr-defined]
        first = (
            group("matrices", "early.weight", "late.weight", weight_decay=decay),
            group("vectors", "early.bias", lr_scale=0.5),
        )
        second = Schedule(0.02, 2, warmup_start=0.25, shape="linear", floor=0.3, betas=(0.8, 0.99), eps=1e-6)
        # Parameters of every age are in one group of the last phase, and the early bias rests from the second on.
        rested = ("early.bias",) if self.whole else ()
        third = group("all", "early.weight", "late.weight", "late.bias", "extra", *rested, weight_decay=decay)
        return [
            Phase(
                "A",
                steps,
                first,
                until=lambda numbers: numbers["loss"] < threshold,
                until_evaluated=(lambda numbers: numbers["of_A"] * numbers["phase_step"] >= least) if least else None,
            ),
            Phase("B", steps, (group("late", "late.weight", "late.bias", lr_scale=0.7),), second, keep_carry=True),
            Phase("C", steps, (third,), Schedule(0.03, shape="constant")),
        ]

    def loader(self, phase: Phase, topology: Topology) -> StatefulLoader[Pairs]:
        if phase.name == "C":
            return epochs(self.config, topology)
        return Endless("one" if phase.name == "A" else "two", self.config, topology)

    def held_out(self, phase: Phase, topology: Topology) -> StatefulLoader[Pairs]:
        return Endless(f"held out of {phase.name}", self.config, topology)

    def count(self, batch: Pairs) -> Counts:
        return {TERM: batch.inputs.shape[0] * batch.inputs.shape[1]}

    def forward(self, model: nn.Module, batch: Pairs, carry: Carry, context: StepContext) -> StepOutput:
        rows, length, _ = batch.inputs.shape
        memory = carry["memory"].tensor if carry else batch.inputs.new_zeros(rows, WIDTH)
        time.sleep(self.pause)
        part = context.topology.shard(length)
        loss = model(batch.inputs[:, part], batch.targets[:, part], memory)
        heavy = {"heavy": (torch.ones(()), torch.ones(()))} if context.heavy_metrics else {}
        return StepOutput({TERM: loss}, {"memory": CarryEntry(remembered(memory, batch))}, heavy)

    @torch.no_grad()
    def begin_phase(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> None:
        sync_point(f"the start of {phase.name}")
        begun = dict(model.named_buffers())["begun"]
        begun.copy_(torch.stack([begun[0] + 1, error_of_ones(model)]))

    def after_step(self, model: nn.Module, context: StepContext) -> None:
        dict(model.named_buffers())["steps"].add_(1)

    def evaluate(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Evaluation:
        found = super().evaluate(model, phase, sync_point)
        # Which phase it is of shows in its numbers.
        return Evaluation({**found.scalars, f"of_{phase.name}": 1.0})

    def samples(
        self, model: nn.Module, phase: Phase, context: StepContext, sync_point: SyncPoint
    ) -> Mapping[str, Sample]:
        sync_point("samples")
        return {"drawn": f"{context.phase} {context.step}", "numbers": {"seed": context.seed}}

    def ablations(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Mapping[str, Evaluation]:
        return {"late bias": self.evaluate(model, phase, sync_point)}

    def flops(self, sequence_length: int, phase: Phase | None = None) -> Flops:
        return Flops(100.0, 200.0 if phase is None or phase.name != "B" else 50.0)

    def activation_bytes(self, topology: Topology, element: int, device: Device) -> Mapping[str, int]:
        return {"activations": 1000}


def error_of_ones(model: nn.Module) -> Tensor:
    """A number that depends on all weights."""
    return model(torch.ones(1, 1, WIDTH), torch.zeros(1, 1, TARGETS), torch.zeros(1, WIDTH)).float()


def remembered(memory: Tensor, batch: Pairs) -> Tensor:
    """What a stream carries on [rows, 4]."""
    return 0.5 * memory + 0.5 * batch.inputs.mean(dim=1)
