"""The cvfp system: what the engine asks of a recurrent model whose contexts are learnt first, tokens afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config import RunConfig
from pipeline.data.batch import Counts, StatefulLoader
from pipeline.errors import UserError
from pipeline.evaluation_result import together
from pipeline.host.devices import Device
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.schedule import Schedule
from pipeline.system import Carry, Evaluation, Flops, ParameterGroup, Phase, StepContext, StepOutput, System
from pipeline.systems.cvfp import costs
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.data.build import build_loader, list_documents
from pipeline.systems.cvfp.documents import DocumentBatch, DocumentSet
from pipeline.systems.cvfp.evaluation.alike import check_alike
from pipeline.systems.cvfp.evaluation.contexts import CRITERIA, HISTORIES, ContextEvaluation
from pipeline.systems.cvfp.evaluation.criteria import lines as criteria_lines
from pipeline.systems.cvfp.evaluation.criteria import verdict
from pipeline.systems.cvfp.evaluation.headline import headline
from pipeline.systems.cvfp.fixed_point.phase import FixedPoint
from pipeline.systems.cvfp.model.model import CvfpModel, parameter_parts
from pipeline.systems.cvfp.model.weights import PUBLISHED_STD, initialise
from pipeline.systems.cvfp.phase import FIXED_POINT, PREDICTION, Data, DocumentLoader, PhaseWork
from pipeline.systems.cvfp.prediction.decoder import CvfpDecoder
from pipeline.systems.cvfp.prediction.phase import Prediction


class CvfpSystem(System[DocumentBatch]):
    """A fixed point of contexts, then token prediction (see pipeline/system.py for what a system is)."""

    name = "cvfp"
    histories = HISTORIES

    def __init__(self, config: RunConfig) -> None:
        sizes = config.model
        assert isinstance(sizes, CvfpConfig)
        if sizes.test and not config.phases:
            # The system has both phases all the same: a checkpoint holds what any of them trains, and another run may
            # go on with it.
            config = dataclasses.replace(config, phases=(FIXED_POINT,))
        super().__init__(config)
        self.sizes = sizes
        self.in_training = FIXED_POINT
        """The phase of which `loader` was asked last."""
        self.in_reading: DocumentLoader | None = None
        """The loader that it returned, whose position says how many steps were made."""

    def check(self, topology: Topology) -> None:
        if topology.sequence > 1:
            raise UserError(
                f"--parallel.sequence {topology.sequence}: contexts follow each other, token by token: leave it out"
            )
        if self.config.sequence_length < 2:
            raise UserError(
                f"--sequence-length {self.config.sequence_length}: a token is to be followed by another: give 2 or more"
            )
        if self.sizes.test and self.config.phases != (FIXED_POINT,):
            raise UserError(
                f"--phases {' '.join(self.config.phases)} with --test, which runs {FIXED_POINT} alone: leave one out"
            )
        self._check_rows()

    def _check_rows(self) -> None:
        """Raises UserError where contexts of a stream would pass from one micro-batch of a step to the next."""
        accum, carry = self.config.grad_accum, self.sizes.carry
        if carry != "document" and accum > 1:
            raise UserError(
                f"--grad-accum {accum}: with --carry {carry} the context goes on from row to row of a step, which is to"
                f" be one micro-batch: give --batch-size {self.config.batch_size * accum}"
            )

    def list_data(self, *, ask_servers: bool = False) -> DocumentSet:
        return list_documents(self.config)

    @property
    def documents(self) -> DocumentSet:
        """The data, listed by this process where no other has."""
        if self.files is None:
            self.files = self.list_data()
        assert isinstance(self.files, DocumentSet)
        return self.files

    @cached_property
    def data(self) -> Data:
        """The documents, and loaders of them."""
        return Data(self.documents, self._open)

    def _open(self, topology: Topology, held_out: bool) -> DocumentLoader:
        return build_loader(self.config, topology, self.documents, held_out=held_out)

    @cached_property
    def work(self) -> Mapping[str, PhaseWork]:
        """What each phase does."""
        return {FIXED_POINT: FixedPoint(self.config, self.data), PREDICTION: Prediction(self.config, self.data)}

    def steps_per_epoch(self, topology: Topology) -> float:
        """Steps of one pass over the training documents; the last may have rows without a document."""
        return self.data.training(topology).slots

    def settled(self, topology: Topology) -> RunConfig:
        # Not in `check` alone: a resume keeps the global batch, on fewer ranks by more micro-batches.
        self._check_rows()
        steps = self.sizes.fixed_point.iterations * self.data.training(topology).slots
        fixed_point = dataclasses.replace(self.sizes.fixed_point, steps=steps)
        model = dataclasses.replace(self.sizes, vocab=self.documents.vocab, fixed_point=fixed_point)
        return dataclasses.replace(self.config, model=model)

    def build(self) -> nn.Module:
        return CvfpModel(self.sizes)

    def initialise(self, model: nn.Module, topology: Topology) -> None:
        initialise(model, self.sizes, self.config.seed, topology, replaced=self.replaced)

    def phases(self, model: nn.Module) -> Sequence[Phase]:
        names = [name for name, _ in model.named_parameters()]
        last = f"blocks.{self.sizes.layers - 1}"
        # Of the last block, a phase leaves one stream alone: its norm is not reached by any gradient.
        blocks, others = (
            tuple(name for name in names if name.startswith(("blocks.", "norm_embed.")) and not name.startswith(unused))
            for unused in (f"{last}.norm_token", f"{last}.norm_context")
        )
        fixed_point = self.sizes.fixed_point
        least = fixed_point.converged
        first = Phase(
            FIXED_POINT,
            max(fixed_point.steps, fixed_point.iterations),
            (ParameterGroup("blocks of the contexts", blocks),),
            Schedule(fixed_point.lr, shape="constant", betas=(0.9, 0.999)),
            until_evaluated=lambda numbers: numbers["converged"] >= least,
            judged=False,
        )
        trained = self.sizes.trains_embedding
        tail = tuple(name for name in names if name.startswith("head.") or (trained and name.startswith("embedding.")))
        groups = [ParameterGroup("head", tail)]
        if not self.sizes.prediction.freeze_context:
            groups.append(ParameterGroup("blocks", others))
        return [first, Phase(PREDICTION, self.config.steps, tuple(groups))]

    def loader(self, phase: Phase, topology: Topology) -> StatefulLoader[DocumentBatch]:
        self.in_training = phase.name
        self.token_term, self.token_weight = self.work[phase.name].token_term, self.work[phase.name].token_weight
        self.in_reading = self.data.training(topology)
        return self.in_reading

    def held_out(self, phase: Phase, topology: Topology) -> StatefulLoader[DocumentBatch]:
        return self.data.held_out(topology)

    def begin_phase(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> None:
        for name, work in self.work.items():
            if name != phase.name:
                work.end()
        self.work[phase.name].begin(model, sync_point)

    def count(self, batch: DocumentBatch) -> Counts:
        return self.work[self.in_training].count(batch)

    def forward(self, model: nn.Module, batch: DocumentBatch, carry: Carry, context: StepContext) -> StepOutput:
        return self.work[context.phase].forward(model, batch, carry, context)

    def after_step(self, model: nn.Module, context: StepContext) -> None:
        self.work[context.phase].after_step(model, context)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Evaluation:
        was_training = model.training
        model.eval()
        try:
            found = self.work[phase.name].evaluate(model, sync_point)
            if phase.name == PREDICTION:
                return found
            if self.sizes.test and self._ends(phase, found):
                return self.contexts.suite(model, sync_point, found)
            return self.contexts.evaluate(model, sync_point, found)
        finally:
            model.train(was_training)

    def _ends(self, phase: Phase, found: Evaluation) -> bool:
        """Whether the phase ends with the step that was made last: by its rule, or by their number."""
        if self.in_reading is None:
            return False
        state = self.in_reading.state_dict()
        steps = state["epoch"] * self.in_reading.slots + state["offset"]
        rule = phase.until_evaluated
        return bool(steps >= phase.steps or (steps and rule is not None and rule(found.scalars)))

    @cached_property
    def contexts(self) -> ContextEvaluation:
        """What is measured of contexts; figures of untrained weights are kept, as no update changes them."""
        return ContextEvaluation(self.config, self.data)

    def check_control(self, checkpoint: Path, other: RunConfig, control: Path) -> None:
        check_alike(self.config, checkpoint, other, control)

    @torch.no_grad()
    def context_suite(
        self, model: nn.Module, phase: Phase, sync_point: SyncPoint, control: tuple[System[Any], nn.Module] | None
    ) -> Evaluation:
        """`eval --suite contexts`: convergence, all measures of contexts, and of a model that predicts tokens its
        perplexity beside those without context."""
        was_training = model.training
        model.eval()
        try:
            found = self.contexts.suite(model, sync_point, self.work[FIXED_POINT].evaluate(model, sync_point))
            if phase.name != PREDICTION:
                return found
            own = self.work[PREDICTION].evaluate(model, sync_point)
            other = None if control is None else (control[0].config, control[1])
            return together(own, found, self.contexts.predictions(model, sync_point, other))
        finally:
            model.train(was_training)

    def headline(self, evaluation: Evaluation) -> str:
        line = headline(evaluation.scalars)
        table = evaluation.tables.get(CRITERIA)
        return "\n".join([line, *criteria_lines(table), verdict(table)]) if self.sizes.test and table else line

    def decoder(self, model: nn.Module) -> CvfpDecoder:
        assert isinstance(model, CvfpModel)
        if self.sizes.test:
            raise UserError(f"{self.config.recipe} with --test trained no head: generate with a run without it")
        return CvfpDecoder(model, zero=self.sizes.prediction.context == "zero")

    def caption(self) -> str:
        sizes = self.sizes
        return f"width {sizes.width}, {sizes.layers} blocks, {sizes.carry}" + (", as published" * sizes.as_published)

    def describe(self, device_type: str, dtype: torch.dtype) -> dict[str, str]:
        sizes, parts = self.sizes, self.parameter_parts()
        given = sizes.embedding is not None
        source = f"of {sizes.embedding}" if given else "random"
        trained = "trained in the second phase" if sizes.trains_embedding else "frozen"
        std, decay = (PUBLISHED_STD, 1.0) if sizes.as_published else (sizes.initial_std, sizes.decay)
        return {
            "model": f"{sizes.layers} blocks of width {sizes.width}; parameters: "
            + ", ".join(f"{name} {number:,}" for name, number in parts.items()),
            "embedding": f"{source}, {trained}",
            "contexts": f"carry {sizes.carry}, decay {decay:g}, initial standard deviation {std:g}",
        }

    def parameter_parts(self) -> Mapping[str, int]:
        """Parameters of embedding, its norm, blocks and head."""
        return parameter_parts(self.sizes)

    def flops(self, sequence_length: int, phase: Phase | None = None) -> Flops:
        return costs.flops(self.sizes, None if phase is None else phase.name)

    def activation_bytes(self, topology: Topology, element: int, device: Device) -> Mapping[str, int]:
        documents = None if self.files is None else self.documents.training
        return costs.activation_bytes(self.sizes, self.config, documents, element, topology.data)
