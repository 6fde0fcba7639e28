"""The steps of the second phase: the next token, from the state of a token that is read with the context before it."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoint.frozen import frozen_weights
from pipeline.config import RunConfig
from pipeline.data.batch import IGNORED, Counts
from pipeline.files.given_path import expanded
from pipeline.parallel.collectives import all_gather_object, shared_errors
from pipeline.parallel.loss import reduce_sums
from pipeline.parallel.topology import Topology
from pipeline.runtime.exit import log_line
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, CarryEntry, Evaluation, StepContext, StepOutput
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.data.cache import make_folder
from pipeline.systems.cvfp.documents import DocumentBatch
from pipeline.systems.cvfp.model.reader import Reader, in_full, shifted
from pipeline.systems.cvfp.phase import Data
from pipeline.systems.cvfp.prediction.exact import exact_inputs
from pipeline.systems.cvfp.prediction.frozen import (
    VERSION,
    FrozenStates,
    FrozenWriter,
    UnwrittenStates,
    frozen_path,
)
from pipeline.systems.cvfp.prediction.labels import count_labels, following, labels_of
from pipeline.systems.cvfp.prediction.unigram import unigram
from pipeline.systems.cvfp.starts import solve_rows, start_of, warn_unsettled, with_ends

CROSS_ENTROPY, STALENESS = "cross_entropy", "staleness"
LARGEST = 700.0
"""Nats whose perplexity a float64 has."""


class Prediction:
    """See `pipeline.systems.cvfp.phase.PhaseWork`.

    Contexts that enter are detached: those of the recurrence at the weights of an earlier step. Tokens without a label
    are not computed: they would change nothing.

    Blocks that are trained have their contexts computed anew every `refresh` epochs, just before the step that reads
    them. With 1 no context is older than its step, and the metric `staleness` is 0. Else it is, of the steps that
    compute them anew, the mean square over dimensions and tokens by which they differ from those of `refresh` epochs
    before: the most that any that entered a step was off.

    Of frozen blocks the states of all tokens are computed once, before the first step, and kept in a file of each data
    rank, which weights and data name: they are in no checkpoint, and a resume reads or computes them again.
    """

    token_term = CROSS_ENTROPY
    token_weight = 1.0

    def __init__(self, config: RunConfig, data: Data) -> None:
        assert isinstance(config.model, CvfpConfig)
        self.config, self.data, self.sizes, self.section = config, data, config.model, config.model.prediction
        self._frozen: FrozenStates | UnwrittenStates | None = None
        self._warned = False

    def begin(self, model: nn.Module, sync_point: SyncPoint) -> None:
        """Token states, where blocks are frozen."""
        self._frozen = self._open(model, sync_point) if self.section.freeze_context else None

    def count(self, batch: DocumentBatch) -> Counts:
        return {CROSS_ENTROPY: count_labels(batch, self._after(batch))}

    def _after(self, batch: DocumentBatch) -> Tensor:
        return following(self.data.documents, batch, way=self.sizes.carry)

    def forward(self, model: nn.Module, batch: DocumentBatch, carry: Carry, context: StepContext) -> StepOutput:
        labels = labels_of(batch, self._after(batch))
        counted, metrics = labels != IGNORED, {}
        labels = labels[counted].unsqueeze(0)
        if self.section.freeze_context:
            if self._frozen is None:
                # After a resume: nothing has begun the phase here.
                self._frozen = self._open(model, SyncPoint(context.topology))
            states = self._frozen.states(batch.slot, int(batch.streams[0])).to(labels.device)
            output = model(states=states.unsqueeze(0), labels=labels)
        else:
            name = f"contexts/{batch.slot}"
            before = carry.get(name)
            inputs, carry = self._contexts(model, batch, carry, context, name)
            if self.section.refresh == 1:
                metrics[STALENESS] = (torch.zeros((), device=labels.device), batch.mask.sum())
            elif before is not None and carry[name] is not before:
                moved = (carry[name].tensor - before.tensor).square().mean(-1)
                metrics[STALENESS] = (moved[batch.mask].sum(), batch.mask.sum())
            output = model(batch.ids[counted].unsqueeze(0), inputs[counted].unsqueeze(0), labels=labels)
        return StepOutput({CROSS_ENTROPY: output.losses.sum()}, carry, metrics)

    def _contexts(
        self, model: nn.Module, batch: DocumentBatch, carry: Carry, context: StepContext, name: str
    ) -> tuple[Tensor, Carry]:
        """What enters each token [rows, L, D], which the carry has by `name` where a later epoch reads it again."""
        width = self.sizes.width
        if self.section.context == "zero":
            return torch.zeros(*batch.ids.shape, width, device=batch.ids.device), carry
        if name in carry and batch.iteration % self.section.refresh:
            return carry[name].tensor, carry
        start = start_of(batch, carry, self.sizes, context.topology)
        solved = solve_rows(Reader(model, width), batch, start, self.sizes, context.topology)
        self._warned = self._warned or warn_unsettled(solved, self.sizes, context.topology)
        contexts, start = in_full(solved.contexts), in_full(solved.start)
        inputs = shifted(contexts, start)
        kept = {} if self.section.refresh == 1 else {name: CarryEntry(inputs)}
        return inputs, with_ends(batch, contexts, start, {**carry, **kept})

    def after_step(self, model: nn.Module, context: StepContext) -> None:
        """Nothing."""

    def end(self) -> None:
        self._frozen = None

    @torch.no_grad()
    def _open(self, model: nn.Module, sync_point: SyncPoint) -> FrozenStates | UnwrittenStates:
        """The token states of this rank's rows, computed where one rank has no file of them. Collective."""
        topology = sync_point.topology
        key = self._key(model, topology)
        folder = expanded(self.sizes.data_cache)
        path = frozen_path(folder, self.data.documents.name, key)
        found: FrozenStates | UnwrittenStates | None = None
        with shared_errors(topology):
            # What cannot be used is said before anything is computed.
            if not self.config.dry_run:
                make_folder(folder)
            found = FrozenStates(path, key) if path.is_file() else None
        if all(all_gather_object(topology, found is not None)):
            assert found is not None
            said = "read from"
        else:
            said = "written to"
            found = self._written(model, sync_point, FrozenWriter(path, key))
        if topology.rank == 0 and not self.config.dry_run:
            log_line(f"token states of frozen blocks: {said} {found.path}")
        return found

    def _written(self, model: nn.Module, sync_point: SyncPoint, writer: FrozenWriter) -> FrozenStates | UnwrittenStates:
        was_training, reader = model.training, Reader(model, self.sizes.width, exact=True)
        model.eval()
        loader = self.data.training(sync_point.topology)
        for batch, inputs in exact_inputs(reader, loader, self.sizes, sync_point, "token states"):
            counted = labels_of(batch, self._after(batch)) != IGNORED
            states = model(batch.ids[counted].unsqueeze(0), inputs[counted].unsqueeze(0)).states
            writer.add(batch.slot, int(batch.streams[0]), states.squeeze(0))
        model.train(was_training)
        if self.config.dry_run:
            return writer.unwritten()
        with shared_errors(sync_point.topology):
            writer.write()
            return FrozenStates(writer.path, writer.key)

    def _key(self, model: nn.Module, topology: Topology) -> dict[str, Any]:
        """All that decides the states of this rank. Collective."""
        module = getattr(model, "module", model)
        head = {name for name, _ in module.named_parameters() if name.startswith("head.")}
        weights = frozen_weights(module, head, topology)
        assert weights is not None
        sizes = self.sizes
        return {
            "version": VERSION,
            "weights": weights["sha256"],
            "precision": str(next(module.parameters()).dtype),
            "recurrence": [sizes.decay, sizes.layernorm_mix, sizes.as_published, sizes.carry, self.section.context],
            "data": self.data.training(topology).state_dict()["fingerprint"],
            "rows": [self.config.batch_size, self.config.grad_accum, topology.data_rank, topology.data],
        }

    @cached_property
    def _unigram(self) -> tuple[Tensor, int]:
        nats, likeliest = unigram(self.data.documents)
        return torch.from_numpy(nats), likeliest

    @torch.no_grad()
    def evaluate(self, model: nn.Module, sync_point: SyncPoint) -> Evaluation:
        """Of held-out documents, by a fresh exact pass: loss, ppl and accuracy, beside a unigram model's, and those of
        the same weights with every context at zero."""
        reader, loader = Reader(model, self.sizes.width, exact=True), self.data.held_out(sync_point.topology)
        nats, likeliest = self._unigram
        table = nats.to(reader.device)
        names = ("loss", "right", "unigram", "unigram_right", "zero", "labels")
        sums = {name: torch.zeros((), dtype=torch.float64, device=reader.device) for name in names}
        for batch, inputs in exact_inputs(reader, loader, self.sizes, sync_point, "evaluation"):
            every = labels_of(batch, self._after(batch))
            counted = every != IGNORED
            ids, labels, inputs = batch.ids[counted].unsqueeze(0), every[counted].unsqueeze(0), inputs[counted]
            found = model(ids, inputs.unsqueeze(0), labels=labels, predict=True)
            without = model(ids, torch.zeros_like(inputs).unsqueeze(0), labels=labels)
            for name, value in (
                ("loss", found.losses.sum(dtype=torch.float64)),
                ("right", (found.predictions == labels).sum()),
                ("unigram", table[labels].sum()),
                ("unigram_right", (labels == likeliest).sum()),
                ("zero", without.losses.sum(dtype=torch.float64)),
                ("labels", counted.sum()),
            ):
                sums[name] += value
        totals = {name: float(value) for name, value in reduce_sums(sums, sync_point.topology, reader.device).items()}
        means = {name: value / max(1.0, totals["labels"]) for name, value in totals.items()}
        return Evaluation(
            {
                "loss": means["loss"],
                "ppl": _perplexity(means["loss"]),
                "accuracy": means["right"],
                "unigram_ppl": _perplexity(means["unigram"]),
                "unigram_accuracy": means["unigram_right"],
                "context_zero_ppl": _perplexity(means["zero"]),
                "labels": totals["labels"],
            }
        )


def _perplexity(nats: float) -> float:
    return math.exp(min(nats, LARGEST))
