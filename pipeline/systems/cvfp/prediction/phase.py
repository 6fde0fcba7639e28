"""The steps of the second phase: the next token, from the state of a token that is read with the context before it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.data.batch import IGNORED, Counts
from pipeline.parallel.loss import reduce_sums
from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.system import Carry, CarryEntry, Evaluation, StepContext, StepOutput
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.documents import DocumentBatch
from pipeline.systems.cvfp.model.reader import Reader, shifted
from pipeline.systems.cvfp.phase import Data
from pipeline.systems.cvfp.prediction.unigram import unigram
from pipeline.systems.cvfp.starts import start_of, with_ends

CROSS_ENTROPY = "cross_entropy"


def labels_of(batch: DocumentBatch) -> Tensor:
    """The token after each [rows, L]; IGNORED where the row ends."""
    labels = torch.full_like(batch.ids, IGNORED)
    labels[:, :-1] = torch.where(batch.mask[:, 1:], batch.ids[:, 1:], IGNORED)
    return labels


class Prediction:
    """See `pipeline.systems.cvfp.phase.PhaseWork`.

    Contexts that enter are detached: those of the recurrence at the weights of an earlier step. Of frozen blocks the
    token states are computed once, in the first pass, and kept in the carry.
    """

    token_term = CROSS_ENTROPY
    token_weight = 1.0

    def __init__(self, config: RunConfig, data: Data) -> None:
        assert isinstance(config.model, CvfpConfig)
        self.config, self.data, self.sizes, self.section = config, data, config.model, config.model.prediction

    def begin(self, model: nn.Module, sync_point: SyncPoint) -> None:
        """Nothing."""

    def count(self, batch: DocumentBatch) -> Counts:
        return {CROSS_ENTROPY: int((batch.lengths - 1).clamp_min(0).sum())}

    def forward(self, model: nn.Module, batch: DocumentBatch, carry: Carry, context: StepContext) -> StepOutput:
        labels, metrics = labels_of(batch), {}
        if self.section.freeze_context:
            states = f"states/{batch.slot}"
            if states not in carry:
                with torch.no_grad():
                    inputs, carry = self._contexts(model, batch, carry, context, f"contexts/{batch.slot}")
                    found = Reader(model, self.sizes.width).states(inputs, batch.ids)
                carry = {name: entry for name, entry in carry.items() if not name.startswith("contexts/")}
                carry = {**carry, states: CarryEntry(found)}
            output = model(states=carry[states].tensor, labels=labels)
        else:
            name = f"contexts/{batch.slot}"
            before = carry.get(name)
            inputs, carry = self._contexts(model, batch, carry, context, name)
            if before is not None and carry[name] is not before:
                moved = (carry[name].tensor - before.tensor).square().mean(-1)
                metrics["staleness"] = ((moved * batch.mask).sum(), batch.mask.sum())
            output = model(batch.ids, inputs, labels=labels)
        return StepOutput({CROSS_ENTROPY: output.losses.sum()}, carry, metrics)

    def _contexts(
        self, model: nn.Module, batch: DocumentBatch, carry: Carry, context: StepContext, name: str
    ) -> tuple[Tensor, Carry]:
        """What enters each token [rows, L, D], which the carry has by `name` until it is computed anew."""
        if self.section.context == "zero":
            zeros = torch.zeros(*batch.ids.shape, self.sizes.width, device=batch.ids.device)
            return zeros, carry
        if name in carry and batch.iteration % self.section.refresh:
            return carry[name].tensor, carry
        width, way = self.sizes.width, self.sizes.carry
        start = start_of(batch, carry, width, context.topology, way=way, other=False)
        contexts = Reader(model, width).contexts(batch.ids, batch.mask, start)
        inputs = shifted(contexts, start)
        return inputs, with_ends(batch, contexts, start, {**carry, name: CarryEntry(inputs)})

    def after_step(self, model: nn.Module, context: StepContext) -> None:
        """Nothing."""

    @torch.no_grad()
    def evaluate(self, model: nn.Module, sync_point: SyncPoint) -> Evaluation:
        """Of held-out documents, by a fresh exact pass: loss, ppl and accuracy, beside a unigram model's, and those of
        the same weights with every context at zero."""
        reader, loader = Reader(model, self.sizes.width), self.data.held_out(sync_point.topology)
        nats, likeliest = unigram(self.data.documents)
        table = torch.from_numpy(nats).to(reader.device)
        names = ("loss", "right", "unigram", "unigram_right", "zero", "labels")
        sums = {name: torch.zeros((), dtype=torch.float64, device=reader.device) for name in names}
        carries: dict[int, Carry] = {}
        for _ in range(loader.slots):
            for micro, unmoved in enumerate(next_step(loader, sync_point, "evaluation")):
                batch = unmoved.to(reader.device)
                carry, labels = carries.get(micro, {}), labels_of(batch)
                zeros = torch.zeros(*batch.ids.shape, self.sizes.width, device=reader.device)
                inputs = zeros
                if self.section.context != "zero":
                    way = self.sizes.carry
                    start = start_of(batch, carry, reader.width, sync_point.topology, way=way, other=False)
                    contexts = reader.contexts(batch.ids, batch.mask, start)
                    inputs = shifted(contexts, start)
                    carries[micro] = with_ends(batch, contexts, start, carry)
                found = model(batch.ids, inputs, labels=labels, predict=True)
                counted = labels != IGNORED
                sums["loss"] += found.losses.sum(dtype=torch.float64)
                sums["right"] += (found.predictions == labels).sum()
                sums["unigram"] += table[labels[counted]].sum()
                sums["unigram_right"] += (labels == likeliest).sum()
                sums["zero"] += model(batch.ids, zeros, labels=labels).losses.sum(dtype=torch.float64)
                sums["labels"] += counted.sum()
        totals = {name: float(value) for name, value in reduce_sums(sums, sync_point.topology, reader.device).items()}
        labels_in_all = max(1.0, totals["labels"])
        losses = {name: totals[name] / labels_in_all for name in ("loss", "unigram", "zero")}
        return Evaluation(
            {
                "loss": losses["loss"],
                "accuracy": totals["right"] / labels_in_all,
                "unigram_ppl": math.exp(losses["unigram"]),
                "unigram_accuracy": totals["unigram_right"] / labels_in_all,
                "context_zero_ppl": math.exp(min(losses["zero"], 700.0)),
            }
        )
