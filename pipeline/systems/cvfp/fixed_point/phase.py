"""The steps of the first phase: contexts near those of the pass before, and spread over all dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.data.batch import Counts
from pipeline.parallel.weights import generator_for
from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.system import Carry, CarryEntry, Evaluation, StepContext, StepOutput
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.documents import DocumentBatch
from pipeline.systems.cvfp.fixed_point.convergence import convergence
from pipeline.systems.cvfp.fixed_point.diversity import diversity_gradient, separable
from pipeline.systems.cvfp.fixed_point.statistics import ContextSums
from pipeline.systems.cvfp.model.reader import Reader, shifted
from pipeline.systems.cvfp.phase import Data
from pipeline.systems.cvfp.starts import start_of, with_ends

DISTANCE, DIVERSITY = "distance", "diversity"


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

    @torch.no_grad()
    def begin(self, model: nn.Module, sync_point: SyncPoint) -> None:
        """Mean and covariance of all contexts at the first weights."""
        was_training = model.training
        model.eval()
        reader = Reader(model, self.sizes.width)
        sums, loader = ContextSums(self.sizes.width, reader.device), self.data.training(sync_point.topology)
        for _ in range(loader.slots):
            for unmoved in next_step(loader, sync_point, "statistics of contexts"):
                batch = unmoved.to(reader.device)
                sums.add(reader.contexts(batch.ids, batch.mask)[batch.mask])
        self._update(model, sums, sync_point.topology, momentum=0.0)
        model.train(was_training)

    def _update(self, model: nn.Module, sums: ContextSums, topology: object, *, momentum: float) -> None:
        mean, covariance = sums.reduced(topology)  # type: ignore[arg-type]
        statistics = model.statistics
        statistics.mean.lerp_(mean.float(), 1 - momentum)
        statistics.covariance.lerp_(covariance.float(), 1 - momentum)

    def count(self, batch: DocumentBatch) -> Counts:
        tokens = int(batch.lengths.sum())
        return {DIVERSITY: tokens, DISTANCE: tokens if batch.iteration else 0}

    def forward(self, model: nn.Module, batch: DocumentBatch, carry: Carry, context: StepContext) -> StepOutput:
        section, width, mask = self.section, self.sizes.width, batch.mask
        reader = Reader(model, width)
        # Every second pass begins elsewhere, so that the distance to the pass before says whether that is forgotten.
        other = section.start == "other" and batch.iteration % 2 == 1
        start = start_of(batch, carry, width, context.topology, way=self.sizes.carry, other=other)
        contexts = reader.contexts(batch.ids, mask, start)
        inputs = shifted(contexts, start) + section.noise * self._noise(batch)
        found = model(batch.ids, inputs).contexts.float()[mask]
        before = carry.get(f"contexts/{batch.slot}")
        distance = found.new_zeros(())
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        tokens = mask.sum()
        if before is not None and batch.iteration:
            previous = before.tensor[mask]
            squares = (found - previous).square().mean(-1)
            apart = squares if section.distance == "raw" else 2 - 2 * F.cosine_similarity(found, previous, dim=-1)
            distance = apart.sum()
            metrics[DISTANCE] = (distance.detach(), tokens)
            moved = (contexts[mask] - previous).square().mean(-1)
            metrics["converged_pass_to_pass"] = ((moved < section.threshold).sum(), tokens)
        statistics = model.statistics
        terms, gradient = diversity_gradient(statistics.covariance, section.diversity)
        spread = separable(found, statistics.mean, gradient).sum()
        value = torch.stack(list(terms.values())).sum() * tokens
        weight = section.diversity_weight
        sums = {DIVERSITY: weight * (spread - spread.detach() + value), DISTANCE: (1 - weight) * distance}
        metrics |= {f"{DIVERSITY}/{name}": (term * tokens, tokens) for name, term in terms.items()}
        metrics["norm"] = (contexts[mask].norm(dim=-1).sum(), tokens)
        self._add(contexts[mask], context.step)
        entry = {f"contexts/{batch.slot}": CarryEntry(contexts)}
        return StepOutput(sums, with_ends(batch, contexts, start, {**carry, **entry}), metrics)

    def _noise(self, batch: DocumentBatch) -> Tensor:
        """Standard normal numbers [rows, L, D] that seed, pass and the rows' places in the data decide."""
        shape = (batch.ids.shape[1], self.sizes.width)
        rows = [
            torch.randn(shape, generator=generator_for(self.config.seed, f"noise {batch.iteration} {first}"))
            for first in batch.first.tolist()
        ]
        return torch.stack(rows).to(batch.ids.device)

    def _add(self, contexts: Tensor, step: int) -> None:
        """To the sums of the step; those of one that was abandoned are forgotten."""
        if self._sums is None or self._step != step:
            self._sums, self._step = ContextSums(self.sizes.width, contexts.device), step
        self._sums.add(contexts)

    @torch.no_grad()
    def after_step(self, model: nn.Module, context: StepContext) -> None:
        assert self._sums is not None and self._step == context.step
        self._update(model, self._sums, context.topology, momentum=self.section.momentum)
        self._sums = None

    def evaluate(self, model: nn.Module, sync_point: SyncPoint) -> Evaluation:
        reader, topology, least = Reader(model, self.sizes.width), sync_point.topology, self.section.threshold
        train = convergence(reader, self.data.training(topology), least, sync_point)
        held = convergence(reader, self.data.held_out(topology), least, sync_point)
        return Evaluation({**train, **{f"{name}_val": value for name, value in held.items()}})
