"""What the system asks of each of its two phases, and the data that they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from pipeline.data.batch import Counts, StatefulLoader
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, Evaluation, StepContext, StepOutput
from pipeline.systems.cvfp.documents import DocumentBatch, DocumentSet

FIXED_POINT, PREDICTION = "fixed_point", "prediction"
"""The phases, in their order."""


class DocumentLoader(StatefulLoader[DocumentBatch], Protocol):
    """Passes over documents, or over parts of the stream, each of `slots` steps."""

    slots: int


@dataclass(frozen=True)
class Data:
    """The documents of a run, and loaders of them that are at their start: a new one for each call."""

    documents: DocumentSet
    open: Callable[[Topology, bool], DocumentLoader]
    """Of a layout, and whether it is the held-out documents."""

    def training(self, topology: Topology) -> DocumentLoader:
        return self.open(topology, False)

    def held_out(self, topology: Topology) -> DocumentLoader:
        return self.open(topology, True)


class PhaseWork(Protocol):
    """The work of one phase: `FixedPoint(config, data)`, `Prediction(config, data)`, of a RunConfig and a `Data`. Each
    method is as `pipeline.system.System` has it; `model` is, or wraps, a CvfpModel, and is called for whatever reads
    its weights."""

    token_term: str
    """The loss term whose counts are tokens; each term of `count` is one of `forward`'s sums, in every step."""
    token_weight: float
    """1: that term is nats per token; 0: there are none, and no perplexity."""

    def begin(self, model: nn.Module, sync_point: SyncPoint) -> None: ...

    def count(self, batch: DocumentBatch) -> Counts: ...

    def forward(self, model: nn.Module, batch: DocumentBatch, carry: Carry, context: StepContext) -> StepOutput: ...

    def after_step(self, model: nn.Module, context: StepContext) -> None: ...

    def evaluate(self, model: nn.Module, sync_point: SyncPoint) -> Evaluation: ...

    def end(self) -> None:
        """Lets go of what steps left behind, once another phase begins."""
        ...
