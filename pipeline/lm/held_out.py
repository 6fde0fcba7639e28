"""Runs of a model over held-out batches, in each of its modes, and sums of what its tokens cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.data.batch import StatefulLoader, TokenBatch
from pipeline.parallel.collectives import shared_errors
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.system import Carry, Phase, StepContext, StepOutput

Modes = Mapping[str, Mapping[str, Any]]
"""Ways to run the model in an evaluation by name, each with its `StepContext.options`. The first is the model as it
is trained; others leave something out."""


class Evaluated(Protocol):
    """What an evaluation asks of a system.

    `forward` gives `losses` [rows, T / degree] in its `tokens`: nats per label, 0 where ignored. With the option
    `predict` it gives `predictions` too: the likeliest id at each place.
    """

    config: RunConfig

    def held_out(self, phase: Phase, topology: Topology) -> StatefulLoader[TokenBatch]: ...

    def byte_lengths(self) -> Tensor | None:
        """Bytes of text that each token id stands for; None where the tokenizer cannot say."""
        ...

    def forward(self, model: nn.Module, batch: TokenBatch, carry: Carry, context: StepContext) -> StepOutput: ...


@dataclass
class BinSums:
    """Per bin, float64: nats, counted labels, right answers."""

    nats: Tensor
    labels: Tensor
    right: Tensor

    @classmethod
    def zeros(cls, bins: int, device: torch.device) -> BinSums:
        return cls(*(torch.zeros(bins, dtype=torch.float64, device=device) for _ in range(3)))

    def add(self, bins: Tensor, losses: Tensor, counted: Tensor, right: Tensor) -> None:
        """Adds the tokens in `counted`, all [rows, T], to their bins; the last bin takes those beyond it."""
        index = bins.clamp(0, self.nats.numel() - 1)[counted]
        self.nats.index_add_(0, index, losses[counted].double())
        self.labels.index_add_(0, index, torch.ones_like(index, dtype=torch.float64))
        self.right.index_add_(0, index, right[counted].double())

    def reduce(self) -> None:
        """Sums over all ranks. Collective."""
        for tensor in (self.nats, self.labels, self.right):
            if dist.is_initialized():
                dist.all_reduce(tensor)


def first_mode(modes: Modes) -> str:
    """The name of the mode in which the model is as it is trained."""
    return next(iter(modes))


def scalar_prefix(modes: Modes, mode: str) -> str:
    """What stands before the names of a mode's scalars: nothing for the first, `memory_off/` for "memory off"."""
    return "" if mode == first_mode(modes) else f"{mode.replace(' ', '_')}/"


def run_as(modes: Modes) -> dict[str, str]:
    """By mode the first one that has its options: of modes that do the same, one need be run."""
    return {mode: next(name for name in modes if modes[name] == options) for mode, options in modes.items()}


def run_held_out(
    system: Evaluated, model: nn.Module, phase: Phase, sync_point: SyncPoint, options: Mapping[str, Any]
) -> list[tuple[TokenBatch, Tensor, Tensor | None]]:
    """Held-out micro-batches of a phase with this rank's losses and predictions [rows, T / degree]. Collective."""
    with shared_errors(sync_point.topology):
        loader = system.held_out(phase, sync_point.topology)
    return run_loader(system, model, loader, sync_point, options)


def run_loader(
    system: Evaluated,
    model: nn.Module,
    loader: StatefulLoader[TokenBatch],
    sync_point: SyncPoint,
    options: Mapping[str, Any],
) -> list[tuple[TokenBatch, Tensor, Tensor | None]]:
    """Micro-batches of `--evaluation.steps` steps with this rank's losses and predictions [rows, T / degree].
    Collective."""
    device = next(model.parameters()).device
    results = []
    carries: dict[int, Carry] = {}
    for step in range(1, system.config.evaluation.steps + 1):
        context = StepContext(sync_point.topology, system.config.seed, "evaluation", step, options)
        for micro, batch in enumerate(next_step(loader, sync_point, "evaluation")):
            batch = batch.to(device)
            output = system.forward(model, batch, carries.get(micro, {}), context)
            carries[micro] = output.carry
            results.append((batch, output.tokens["losses"], output.tokens.get("predictions")))
    return results
