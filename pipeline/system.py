"""The base class of the systems, what passes between a system and the engine, and the registry."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor, nn

from pipeline.data.batch import B, Counts, StatefulLoader
from pipeline.errors import UserError
from pipeline.evaluation_result import TASKS, Curve, Evaluation, Sample  # noqa: F401 - they pass between the two as well
from pipeline.panel import Panels
from pipeline.parallel.collectives import shared_errors
from pipeline.parallel.loss import reduce_sums
from pipeline.runtime.sync import next_counted_step
from pipeline.schedule import Schedule

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.host.devices import Device
    from pipeline.parallel.topology import Topology
    from pipeline.runtime.sync import SyncPoint


@dataclass(frozen=True)
class CarryEntry:
    """One tensor of state that outlives a step, and where its stream and head dimensions are.

    `heads` is None when the tensor is whole on every sequence rank.
    """

    tensor: Tensor
    streams: int = 0
    heads: int | None = None


Carry = dict[str, CarryEntry]
"""State of the rows of one micro-batch, by name."""


@dataclass(frozen=True)
class StepContext:
    """What a forward pass may know about where it is. Noise is a function of (seed, phase, step, global position)."""

    topology: Topology
    seed: int
    phase: str
    step: int
    options: Mapping[str, Any] = field(default_factory=dict)
    """Switches of an evaluation, e.g. {"memory": False}."""
    heavy_metrics: bool = False
    """Whether metrics that cost time are wanted: in training where the step is logged. A row then has their mean over
    these steps alone, and no such key where a run was stopped between two."""


@dataclass(frozen=True)
class StepOutput:
    """A forward pass: this rank's *sum* per loss term, the new carry, and metrics left on the device.

    A metric is (sum, count) of this rank; the engine adds both up over ranks and micro-batches and reports sum / count.
    """

    sums: dict[str, Tensor]
    carry: Carry
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """Detached per-token values of this rank's part [rows, T / degree], for evaluations."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters (by name) that share a learning-rate multiple and a decay."""

    name: str
    parameters: tuple[str, ...]
    lr_scale: float = 1.0
    weight_decay: float = 0.0


StoppingRule = Callable[[Mapping[str, float]], bool]
"""Of the numbers of one step, the same on every rank: `loss`, `phase_step`, `tokens` and the system's metrics (those
that cost time at logged steps alone). It is a function of these alone: what it remembered of earlier steps would be
lost by a resume. A system that counts keeps the count in a buffer of the model, and reports it as a metric."""


@dataclass(frozen=True)
class Phase:
    """A stretch of the run with one data stream, one set of trainable parameters and one schedule."""

    name: str
    steps: int
    """The most updates it makes."""
    groups: tuple[ParameterGroup, ...]
    schedule: Schedule | None = None
    """None: the one that the flags of the run describe."""
    until: StoppingRule | None = None
    """Ends the phase before its last step; asked after every step."""
    until_evaluated: StoppingRule | None = None
    """As `until`, asked of the scalars of each held-out evaluation that is due in the phase, and `phase_step`: the same
    on every rank, as collectives made them. Before the phase's first step it is not asked."""
    judged: bool = True
    """Whether the evaluations in it count for --evaluation.best and --evaluation.patience."""
    keep_carry: bool = False
    """Whether the carry of the streams and the loader's position go on into it from the phase before. Otherwise the
    carry is empty and the loader is at its start."""


@dataclass(frozen=True)
class Flops:
    """Model floating-point operations per token; recomputation is not counted."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


class System(ABC, Generic[B]):
    """One research system, for batches of the kind `B`. The engine owns devices, precision, sharding, time and files; a
    system owns its maths. What only some systems can do is in pipeline/capabilities.py."""

    name: str
    token_term: str = "cross_entropy"
    """The loss term whose counts are tokens; the others average over whatever they like."""
    token_weight: float = 1.0
    """By what its sums are multiplied in the loss; 0: it is not measured in training, and perplexity is not known."""
    histories: Mapping[str, tuple[str, ...]] = {}
    """Pictures over the steps by the names of their files: the metrics and held-out scalars that each one shows."""
    panels: Panels = {}
    """Pictures of several panels, which stand in the run directory, by name and the phase that a run has come to."""
    files: Any = None
    """What rank 0 has found by `list_data`, set before `settled` and `loader` are called in a run; None: this process
    lists it."""
    reached: str | None = None
    """The phase of the run that the weights of a checkpoint come from, where text is generated; None: not known."""
    replaced: Collection[str] = frozenset()
    """Parameters that a checkpoint fills right after `initialise`, set before it is called: what it would read for them
    need not be there any more."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def check(self, topology: Topology) -> None:
        """Raises UserError for sizes that cannot be laid out so, before anything is built. By default all can."""

    def list_data(self, *, ask_servers: bool = False) -> Any:
        """What there is of the data, as this process sees it: the `files` of every rank, which it is sent to. With
        `ask_servers`, also what is said of URLs. Raises UserError. By default the files or token files of the `data`
        section.
        """
        from pipeline.data.build import list_data

        return list_data(self.config, ask_servers=ask_servers)

    def settled(self, topology: Topology) -> RunConfig:
        """The config with all that the data decides, such as sizes of the model, once `files` is set: what the run
        trains by, archives, and compares at a resume. A function of config, files and layout alone, which changes
        nothing when it is asked of its own result. By default nothing is.
        """
        return self.config

    def describe(self, device_type: str, dtype: torch.dtype) -> dict[str, str]:
        """What was chosen on this machine, for the log: {"attention": "window of 4096 tokens, backend flex", ...}."""
        return {}

    def caption(self) -> str:
        """What distinguishes this run from others of its recipe, in a few words for titles of plots: "window 64"."""
        return ""

    def headline(self, evaluation: Evaluation) -> str:
        """Held-out numbers as one short line for a person; the files have all of them."""
        names = [x for x in evaluation.scalars if x not in ("loss", "bpb") and not x.endswith(("ppl", "labels"))]
        names = [x for x in names if not x.startswith(TASKS)]
        parts = [f"val {evaluation.scalars['loss']:.3f}"] if "loss" in evaluation.scalars else []
        parts += [f"{name} {evaluation.scalars[name]:.4g}" for name in names]
        parts += [f"{evaluation.scalars['bpb']:.2f} bpb"] if "bpb" in evaluation.scalars else []
        return " | ".join(parts)

    def health(self, metrics: Mapping[str, float]) -> str:
        """The last logged step's metrics of the system in words, shown with an evaluation; empty: nothing is shown."""
        return " | ".join(f"{name} {value:.3g}" for name, value in metrics.items())

    @abstractmethod
    def build(self) -> nn.Module:
        """Everything, once, with uninitialised weights; phases freeze parts of it."""

    @abstractmethod
    def initialise(self, model: nn.Module, topology: Topology) -> None:
        """Fills the weights, sharded or not: pretrained ones, or random ones that seed and names decide. Collective."""

    @abstractmethod
    def phases(self, model: nn.Module) -> Sequence[Phase]:
        """What the run trains, one after the other."""

    @abstractmethod
    def loader(self, phase: Phase, topology: Topology) -> StatefulLoader[B]:
        """The training data of a phase, for this data rank."""

    @abstractmethod
    def held_out(self, phase: Phase, topology: Topology) -> StatefulLoader[B]:
        """The held-out data of a phase, at its start."""

    @abstractmethod
    def count(self, batch: B) -> Counts:
        """What each loss term averages over, of one micro-batch."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: B, carry: Carry, context: StepContext) -> StepOutput:
        """Sums of the loss terms of one micro-batch, on the device of `batch`."""

    def begin_phase(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> None:
        """Before the first step of a phase, once: what a phase needs to know of its data or of the weights it begins
        with. What it writes to buffers of the model is in every checkpoint; a start that goes on from one inside the
        phase does not call it. By default nothing.

        Collective; leaves the model's mode as it found it. `model` is the engine's module: whatever reads its weights
        goes through a call of it, as in training. A long one calls `sync_point` between its batches.
        """

    def after_step(self, model: nn.Module, context: StepContext) -> None:
        """After an update that was not skipped: moving averages and the like. By default nothing."""

    @torch.no_grad()
    def evaluate(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Evaluation:
        """Held-out numbers, the same on every rank. Collective; leaves the model's mode as it found it.

        `next_step` calls `sync_point` before each batch, so that a stop need not wait for it. By default `loss`, as in
        training: the mean of each loss term over `--evaluation.steps` steps of `held_out`, added up; several terms are
        also given one by one, as `loss/TERM`. The carry is empty at the start.
        """
        topology, device, was_training = sync_point.topology, next(model.parameters()).device, model.training
        with shared_errors(topology):
            loader = self.held_out(phase, topology)
        carries: dict[int, Carry] = {}
        sums: dict[str, Tensor] = {}
        totals: dict[str, float] = {}
        model.eval()
        try:
            for step in range(1, self.config.evaluation.steps + 1):
                context = StepContext(topology, self.config.seed, "evaluation", step)
                batches, counts = next_counted_step(loader, sync_point, "evaluation", self.count)
                totals = {term: totals.get(term, 0.0) + count for term, count in counts.items()}
                for micro, batch in enumerate(batches):
                    output = self.forward(model, batch.to(device), carries.get(micro, {}), context)
                    carries[micro] = output.carry
                    for term, value in output.sums.items():
                        sums[term] = sums.get(term, 0.0) + value.double()
        finally:
            model.train(was_training)
        reduced = reduce_sums(sums, topology, device)
        means = {term: float(value) / max(1.0, totals[term]) for term, value in reduced.items()}
        terms = {f"loss/{term}": mean for term, mean in means.items()} if len(means) > 1 else {}
        return Evaluation({"loss": sum(means.values()), **terms})

    def flops(self, sequence_length: int, phase: Phase | None = None) -> Flops:
        """Of one token of a sequence, in training in a phase; None: in any, of a system whose phases cost the same.

        By default two per element of every matrix forward and four backward, without embeddings: what all parts of a
        model cost that are applied once a token, attention left out.
        """
        with torch.device("meta"):
            model = self.build()
        # By identity: a head that is tied to an embedding is applied, and counts.
        matrices = {
            id(parameter): parameter.numel()
            for module in model.modules()
            if not isinstance(module, nn.Embedding)
            for parameter in module.parameters(recurse=False)
            if parameter.dim() > 1
        }
        forward = 2.0 * sum(matrices.values())
        return Flops(forward, 2 * forward)

    def activation_bytes(self, topology: Topology, element: int, device: Device) -> Mapping[str, int]:
        """Estimate of what a step holds on one rank beside weights, gradients and optimizer, at `element` bytes per
        number on such a device: bytes by what they are, which add up to the most there is at a time. By default
        nothing: `plan` then counts the weights, the gradients and the optimizer alone."""
        return {}


def create_system(config: RunConfig) -> System:
    """The system that `config.model.system` names; its package holds `create(config)`."""
    name = config.model.system
    try:
        module = importlib.import_module(f"pipeline.systems.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"pipeline.systems.{name}":
            raise
        raise UserError(f"no system is called {name!r}: see pipeline/systems") from None
    return module.create(config)
