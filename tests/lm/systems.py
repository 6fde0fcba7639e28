"""A system of which an evaluation asks no more than `Evaluated`: what its tokens cost is written down."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.config import EvaluationConfig, ModelConfig, RunConfig
from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.lm.passages import PASSAGE
from pipeline.parallel.topology import Topology
from pipeline.runtime.stop import StopRequests
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, Phase, StepContext

PHASE = Phase("train", 1, ())
ON, OFF = "memory on", "memory off"
MODES = {ON: {"memory": True}, OFF: {"memory": False}}
WINDOW = 64
EDGES = {"window of 64": 64.0, "reach of 4 layers": 252.0}


def config(length: int, steps: int = 1) -> RunConfig:
    """A run whose evaluations read `steps` sequences of `length` tokens."""
    evaluation = EvaluationConfig(steps=steps)
    return RunConfig("", ModelConfig(), steps=1, batch_size=4, sequence_length=length, lr=1.0, evaluation=evaluation)


class System:
    """Held-out rows of two documents, HALF tokens each. A token costs `loss` of (memory on, position) nats."""

    def __init__(self, length: int, steps: int = 1, rows: int = 2) -> None:
        self.length, self.rows, self.forwards = length, rows, 0
        self.config = config(length, steps)

    def loss(self, memory: bool, batch: TokenBatch) -> Tensor:
        return torch.full(batch.labels.shape, 3.0)

    def held_out(self, phase: Phase, topology: Topology) -> System:
        self.step = 0
        return self

    def next_step(self) -> Sequence[TokenBatch]:
        half = self.length // 2
        ids = torch.arange(self.length).expand(self.rows, -1) % 7
        segments = (2 * self.step + (torch.arange(self.length) >= half)).expand(self.rows, -1)
        labels = torch.where(torch.arange(self.length) % half == half - 1, IGNORED, ids)
        positions = (torch.arange(self.length) % half).expand(self.rows, -1)
        self.step += 1
        return [TokenBatch(ids, labels, segments, positions, torch.arange(self.rows))]

    def file_loaders(self, topology: Topology) -> dict[str, System]:
        return {}

    def byte_lengths(self) -> Tensor:
        return torch.full((7,), 2.0)

    def forward(self, model: nn.Module, batch: TokenBatch, carry: Carry, context: StepContext) -> types.SimpleNamespace:
        self.forwards += 1
        losses = self.loss(bool(context.options.get("memory", True)), batch)
        return types.SimpleNamespace(tokens={"losses": losses}, carry={})


class Remembering(System):
    """With memory, what stands beyond the window costs half a nat less, and a copy two nats less than the passage."""

    def loss(self, memory: bool, batch: TokenBatch) -> Tensor:
        losses = super().loss(memory, batch)
        if (batch.labels[:, 0] == IGNORED).all():  # passages: their cues are not counted
            return losses - 2 * memory * (batch.positions >= PASSAGE)
        return losses - 0.5 * memory * (batch.positions >= WINDOW)


class Counting(SyncPoint):
    """Asks for a stop at the call after `calls`."""

    def __init__(self, calls: int) -> None:
        super().__init__(Topology(), StopRequests())
        self.calls = calls

    def __call__(
        self, place: str, problem: str | None = None, counts: Mapping[str, int] | None = None
    ) -> dict[str, float]:
        assert self.requests is not None
        self.calls -= 1
        if self.calls < 0:
            self.requests.max_hours = 0
        return super().__call__(place, problem, counts)
