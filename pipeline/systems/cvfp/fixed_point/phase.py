"""The steps of the first phase: contexts near those of the pass before, and spread over all dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.data.batch import Counts
from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.system import Carry, CarryEntry, Evaluation, StepContext, StepOutput
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.documents import DocumentBatch
from pipeline.systems.cvfp.fixed_point.convergence import convergence
from pipeline.systems.cvfp.fixed_point.distances import distances
from pipeline.systems.cvfp.fixed_point.diversity import diversity_gradient, separable
from pipeline.systems.cvfp.fixed_point.lasting import lasting
from pipeline.systems.cvfp.fixed_point.noise import noise
from pipeline.systems.cvfp.fixed_point.statistics import ContextSums
from pipeline.systems.cvfp.model.reader import Reader, in_full, shifted
from pipeline.systems.cvfp.phase import Data
from pipeline.systems.cvfp.starts import (
    ends_of_others,
    needs_others,
    solve_rows,
    start_of,
    warn_unsettled,
    with_ends,
)

DISTANCE, DIVERSITY = "distance", "diversity"
MOMENTS = "statistics.moments"
"""The model's buffer of the moving average."""


class FixedPoint:
    """See `pipeline.systems.cvfp.phase.PhaseWork`.

    The loss is (1 - w) x distance + w x diversity. Each context enters the blocks as the recurrence left it, with
    noise, detached; so all tokens of a step are one application of the blocks.
    """

    token_term = DIVERSITY
    token_weight = 0.0

    def __init__(self, config: RunConfig, data: Data) -> None:
        assert isinstance(config.model, CvfpConfig)
        self.config, self.data, self.sizes, self.section = config, data, config.model, config.model.fixed_point
        self._sums: ContextSums | None = None
        self._step = -1
        self._warned = False
        # Slots without contexts of the pass before: of the first pass, or where its update was skipped.
        self._missing: set[int] = set()
        self._slot, self._slots = 0, 1
        self._gradients: tuple[tuple[int, int], tuple[Mapping[str, Tensor], Tensor]] | None = None
        # By a micro-batch's first stream: of the step that is being made, and of the last one that was.
        self._leaving: dict[int, Carry] = {}
        self._carries: dict[int, Carry] = {}

    @torch.no_grad()
    def begin(self, model: nn.Module, sync_point: SyncPoint) -> None:
        """Second moments of all training contexts at the first weights: the statistics that the first step goes by."""
        was_training = model.training
        model.eval()
        try:
            reader = Reader(model, self.sizes.width)
            sums, loader = ContextSums(self.sizes.width, reader.device), self.data.training(sync_point.topology)
            for _ in range(loader.slots):
                for unmoved in next_step(loader, sync_point, "statistics of contexts"):
                    batch = unmoved.to(reader.device)
                    sums.add(reader.contexts(batch.ids, batch.mask)[batch.mask])
            self._update(model, *sums.moments(sync_point.topology), momentum=0.0)
        finally:
            model.train(was_training)

    @staticmethod
    def _update(model: nn.Module, moments: Tensor, share: float, *, momentum: float) -> None:
        averages = model.get_buffer(MOMENTS)
        averages.lerp_(moments.to(averages), 1 - momentum**share)

    @cached_property
    def _tokens(self) -> int:
        """Of a pass over the training documents."""
        documents = self.data.documents
        lengths = np.diff(documents.ends[: documents.training], prepend=0)
        return int(
            (np.minimum(lengths, self.config.sequence_length) if self.sizes.carry == "document" else lengths).sum()
        )

    def _diversity(self, moments: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        """Of the moving averages as they are: once a step, whatever micro-batches it has."""
        key = moments.data_ptr(), moments._version
        if self._gradients is None or self._gradients[0] != key:
            self._gradients = key, diversity_gradient(moments, self.section.diversity)
        return self._gradients[1]

    def count(self, batch: DocumentBatch) -> Counts:
        tokens = int(batch.lengths.sum())
        compared = batch.iteration and batch.slot not in self._missing
        return {DIVERSITY: tokens, DISTANCE: tokens if compared else 0}

    def forward(self, model: nn.Module, batch: DocumentBatch, carry: Carry, context: StepContext) -> StepOutput:
        """The sums of both terms, of one micro-batch; the contexts that the recurrence found go to the carry.

        The statistics do not change within a step, so micro-batches and ranks add up to the gradient of the whole.
        """
        section, width, mask = self.section, self.sizes.width, batch.mask
        self._slot, self._slots = batch.slot, batch.slots
        tokens = mask.sum()
        # Every second pass begins elsewhere, so that the distance to the pass before says whether that is forgotten.
        other = section.start == "other" and batch.iteration % 2 == 1
        reader = Reader(model, width)
        if other and self.sizes.carry == "document" and needs_others(batch):
            start = ends_of_others(reader, self.data.documents, batch)
        else:
            start = start_of(batch, carry, self.sizes, context.topology, other=other)
        before = carry.get(f"contexts/{batch.slot}")
        # Sweeps begin near where they end; a pass token after token has no use for it.
        initial = None if before is None else before.tensor
        solved = solve_rows(reader, batch, start, self.sizes, context.topology, initial)
        self._warned = self._warned or warn_unsettled(solved, self.sizes, context.topology)
        contexts, start = lasting(in_full(solved.contexts)), in_full(solved.start)
        sweeps, residual = solved.sweeps, solved.residual
        # Before the activations of the blocks, beside which there is to be as little as can be.
        del solved
        norms = self._add(contexts[mask], context.step)
        inputs = shifted(contexts, start)
        if section.noise:
            inputs += section.noise * noise(batch, width, self.config.seed, way=self.sizes.carry)
        found = in_full(model(batch.ids, inputs, contexts_alone=True).contexts)[mask]
        distance, metrics = self._distance(found, before, batch)
        terms, gradient = self._diversity(model.get_buffer(MOMENTS))
        value = torch.stack(list(terms.values())).sum().to(found) * tokens
        metrics |= {f"{DIVERSITY}/{name}": (term * tokens, tokens) for name, term in terms.items()}
        metrics["norm"] = (norms, tokens)
        if self.sizes.solve.way != "sequential":
            for name, number in (("sweeps", sweeps), ("residual", residual)):
                metrics[name] = (torch.full_like(distance, number), torch.ones_like(tokens))
        weight = section.diversity_weight
        sums = {
            DIVERSITY: weight * (separable(found, gradient).sum() + value),
            DISTANCE: (1 - weight) * distance,
        }
        entry = {f"contexts/{batch.slot}": CarryEntry(contexts)}
        self._leaving[int(batch.streams[0])] = {**carry, **entry}
        return StepOutput(sums, with_ends(batch, contexts, start, {**carry, **entry}), metrics)

    def _distance(
        self, found: Tensor, before: CarryEntry | None, batch: DocumentBatch
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The sum over tokens of the distance to the pass before, 0 where there is none, and what is said of it."""
        if before is None:
            self._missing.add(batch.slot)
        if before is None or not batch.iteration:
            return found.new_zeros(()), {}
        previous, tokens = before.tensor[batch.mask], batch.mask.sum()
        distance = distances(found, previous, self.section.distance).sum()
        return distance, {DISTANCE: (distance.detach(), tokens)}

    def _add(self, contexts: Tensor, step: int) -> Tensor:
        """To the sums of the step; those of one that was abandoned are forgotten. Returns the sum of their norms."""
        if self._sums is None or self._step != step:
            self._sums, self._step = ContextSums(self.sizes.width, contexts.device), step
        self._sums.add(contexts)
        return contexts.norm(dim=-1).sum()

    @torch.no_grad()
    def after_step(self, model: nn.Module, context: StepContext) -> None:
        """The step's contexts go into the moving averages: those of as many tokens as a step has on average by the
        momentum, others by its power, so that a last step of few documents counts for few. Collective."""
        assert self._sums is not None and self._step == context.step
        moments, count = self._sums.moments(context.topology)
        self._update(model, moments, count * self._slots / self._tokens, momentum=self.section.momentum)
        self._sums = None
        self._missing.discard(self._slot)
        self._carries, self._leaving = self._leaving, {}

    def end(self) -> None:
        self._carries, self._leaving = {}, {}

    def _before(self, batch: DocumentBatch) -> Tensor | None:
        """The contexts of these tokens in the last pass of training that this process knows of."""
        entry = self._carries.get(int(batch.streams[0]), {}).get(f"contexts/{batch.slot}")
        return None if entry is None else entry.tensor

    def evaluate(self, model: nn.Module, sync_point: SyncPoint) -> Evaluation:
        """The convergence of training and of held-out (`..._val`) documents, whose contexts are found token after token
        whatever way training takes: what sweeps leave out would look like a start that is not forgotten. Of training
        documents also by the guide's rule, of this pass and the last one of training."""
        reader, threshold = Reader(model, self.sizes.width, exact=True), self.section.threshold
        training, held_out = self.data.training(sync_point.topology), self.data.held_out(sync_point.topology)
        goes_on = self.sizes.carry != "document"
        train = convergence(reader, training, threshold, sync_point, before=self._before, goes_on=goes_on)
        held = convergence(reader, held_out, threshold, sync_point)
        return Evaluation({**train, **{f"{name}_val": value for name, value in held.items()}})
