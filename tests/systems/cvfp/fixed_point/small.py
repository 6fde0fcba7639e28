"""A small model and documents for the first phase, in float64, without an engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.data.batch import Counts
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, StepContext
from pipeline.systems.cvfp.config import CvfpConfig, FixedPointConfig, SolveConfig
from pipeline.systems.cvfp.data.loader import PassLoader
from pipeline.systems.cvfp.fixed_point.phase import FixedPoint
from pipeline.systems.cvfp.model.model import CvfpModel
from pipeline.systems.cvfp.model.weights import initialise
from pipeline.systems.cvfp.phase import FIXED_POINT, Data
from tests.systems.cvfp.evaluation.reading import documents

WIDTH, LENGTH, ROWS, VOCAB = 6, 9, 4, 13
ONE = Topology()
LENGTHS = [9, 3, 9, 7, 5, 9, 2, 8, 6, 9, 4, 9]
"""The last two are held out: 10 documents in slots of 4, the last of which has two rows without a document."""


class Small:
    """The first phase of a model in float64, and what an engine does with it."""

    def __init__(
        self,
        *,
        lengths: list[int] = LENGTHS,
        training: int = 10,
        carry: Any = "document",
        solve: SolveConfig | None = None,
        **section: Any,
    ):
        sizes = CvfpConfig(
            width=WIDTH,
            layers=2,
            vocab=VOCAB,
            carry=carry,
            fixed_point=FixedPointConfig(**section),
            initial_std=0.2,
            solve=solve or SolveConfig(),
        )
        self.carry = carry
        self.config = RunConfig("small", sizes, steps=1, batch_size=ROWS, sequence_length=LENGTH, lr=0.1)
        self.documents = documents(lengths, training, VOCAB)
        self.work = FixedPoint(self.config, Data(self.documents, self.open))
        self.model = CvfpModel(sizes)
        initialise(self.model, sizes, 0, ONE)
        self.model = self.model.double()
        # It is float32 whatever the model computes in.
        assert self.model.statistics.moments.dtype == torch.float32
        self.model.statistics.moments = self.model.statistics.moments.double()

    def open(self, topology: Topology, held_out: bool = False, *, rows: int = ROWS, **layout: int) -> PassLoader:
        return PassLoader(
            self.documents,
            held_out=held_out,
            length=self.config.sequence_length,
            batch_size=rows,
            seed=0,
            shuffle=not held_out,
            stream=self.carry != "document",
            adjacent=self.config.model.adjacent,  # type: ignore[attr-defined]
            **layout,
        )

    def begin(self) -> None:
        self.work.begin(self.model, SyncPoint(ONE))

    def step(
        self, loaders: list[PassLoader], carries: dict[tuple[int, int], Carry], step: int
    ) -> tuple[dict[str, Tensor], dict[str, tuple[float, float]]]:
        """One step of every loader, each that of a rank: gradients of the mean loss by name, and metrics."""
        context = StepContext(ONE, 0, FIXED_POINT, step)
        batches = {
            (rank, micro): batch
            for rank, loader in enumerate(loaders)
            for micro, batch in enumerate(loader.next_step())
        }
        counts: Counts = {}
        for batch in batches.values():
            counts = {term: counts.get(term, 0) + count for term, count in self.work.count(batch).items()}
        self.model.zero_grad()
        metrics: dict[str, tuple[float, float]] = {}
        for place, batch in batches.items():
            output = self.work.forward(self.model, batch, carries.get(place, {}), context)
            assert output.sums.keys() == counts.keys()
            loss = sum(value / max(1, counts[term]) for term, value in output.sums.items())
            assert isinstance(loss, Tensor)
            loss.backward()
            carries[place] = output.carry
            for name, (value, count) in output.metrics.items():
                before = metrics.get(name, (0.0, 0.0))
                metrics[name] = (before[0] + float(value), before[1] + float(count))
        self.work.after_step(self.model, context)
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
        return gradients, metrics
