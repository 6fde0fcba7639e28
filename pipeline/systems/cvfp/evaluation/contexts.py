"""What the system is asked to evaluate of its contexts, in training and by `eval --suite contexts`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import nn

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.evaluation_result import Evaluation
from pipeline.host.hardware import peak_memory
from pipeline.parallel.weights import gathered
from pipeline.runtime.sync import SyncPoint
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.documents import DocumentSet
from pipeline.systems.cvfp.evaluation.control import CONTROL, LABELS, MODEL, compared
from pipeline.systems.cvfp.evaluation.criteria import criteria_table
from pipeline.systems.cvfp.evaluation.measures import ContextMeasures
from pipeline.systems.cvfp.evaluation.prediction import nats_by_row
from pipeline.systems.cvfp.evaluation.reader import Reads
from pipeline.systems.cvfp.model.model import CvfpModel, Head
from pipeline.systems.cvfp.model.reader import Reader
from pipeline.systems.cvfp.model.weights import EMBEDDING, initialise


class ContextEvaluation:
    """Of one run, whose system keeps it: baselines are measured once."""

    def __init__(self, config: RunConfig, documents: DocumentSet) -> None:
        assert isinstance(config.model, CvfpConfig)
        self.config, self.sizes = config, config.model
        self.measures = ContextMeasures(config, documents, self._untrained)
        self._model: nn.Module | None = None
        self._sync_point: SyncPoint | None = None

    def evaluate(self, model: nn.Module, sync_point: SyncPoint, found: Evaluation) -> Evaluation:
        """What `ContextMeasures.evaluate` finds, with what is `found` already, such as the share of converged tokens,
        and the table of criteria. Collective; raises UserError."""
        return self._merged(found, self.measures.evaluate(self._reader(model, sync_point), sync_point))

    def suite(self, model: nn.Module, sync_point: SyncPoint, found: Evaluation) -> Evaluation:
        """As `evaluate`, of `ContextMeasures.suite`. Collective; raises UserError."""
        return self._merged(found, self.measures.suite(self._reader(model, sync_point), sync_point))

    def predictions(
        self, model: nn.Module, sync_point: SyncPoint, control: tuple[RunConfig, nn.Module] | None
    ) -> Evaluation:
        """Perplexities on held-out documents beside a unigram model, the same weights without context, and a control
        (the config of its run, and its model), with intervals over documents. Collective."""
        reading, width = self.measures.reading, self.sizes.width
        learnt = self.sizes.prediction.context != "zero"
        sums = nats_by_row(model, width, reading, sync_point, with_context=learnt)
        if control is not None:
            other, module = control
            assert isinstance(other.model, CvfpConfig)
            of_control = nats_by_row(module, other.model.width, reading, sync_point, with_context=False)
            assert torch.equal(of_control[LABELS], sums[LABELS])
            sums[CONTROL] = of_control[MODEL]
        return compared(sums)

    def check_control(self, other: RunConfig, name: str) -> None:
        """Raises UserError where a run is not one that was trained alike, on the same documents, without context."""
        what = f"--control {name}"
        if not isinstance(other.model, CvfpConfig):
            raise UserError(f"{what}: is a run of {other.recipe}: give one of {self.config.recipe}")
        if other.model.prediction.context != "zero":
            raise UserError(f"{what}: was trained with its contexts: give a run with --model.prediction.context zero")
        for flag, mine, theirs in (
            ("--data", self.config.data, other.data),
            ("--num-samples", self.sizes.num_samples, other.model.num_samples),
            ("--sequence-length", self.config.sequence_length, other.sequence_length),
            ("--evaluation.path", self.config.evaluation.path, other.evaluation.path),
            ("--carry", self.sizes.carry, other.model.carry),
        ):
            if mine != theirs:
                raise UserError(
                    f"{what}: differs in {flag}, so that its documents are others: give a run of the same data"
                )

    def _merged(self, found: Evaluation, more: Evaluation) -> Evaluation:
        scalars = {**found.scalars, **more.scalars}
        table = criteria_table(scalars, converged=self.sizes.fixed_point.converged, peak_bytes=peak_memory())
        return dataclasses.replace(
            more, scalars=scalars, curves={**found.curves, **more.curves}, tables={**more.tables, "criteria": table}
        )

    def _reader(self, model: nn.Module, sync_point: SyncPoint) -> Reads:
        self._model, self._sync_point = model, sync_point
        return Reader(model, self.sizes.width)

    def _untrained(self, published: bool) -> Reads:
        """A model of its own, float32 and whole on every rank, without the head, whose embedding is that of the trained
        one where that is a given one, which no phase trains. Collective."""
        assert self._model is not None and self._sync_point is not None
        trained = getattr(self._model, "module", self._model)
        assert isinstance(trained, CvfpModel)
        sizes = dataclasses.replace(self.sizes, as_published=published or self.sizes.as_published)
        with torch.device("meta"):
            model = CvfpModel(sizes)
            model.head = Head(sizes.width, 1)
        model = model.to_empty(device="cpu").float()
        same = sizes.embedding is not None and not sizes.train_embedding
        replaced = [EMBEDDING] if same else []
        initialise(model, sizes, self.config.seed, self._sync_point.topology, replaced=replaced)
        if same:
            with torch.no_grad(), gathered(trained.embedding.parameters()):
                model.embedding.weight.copy_(trained.embedding.weight)
        return Reader(model.eval().to(next(self._model.parameters()).device), sizes.width)


def headline(scalars: Mapping[str, float]) -> str:
    """The numbers of an evaluation as one line; empty where there are none of this system's."""

    def percent(name: str) -> str:
        return f"{100 * scalars.get(name, math.nan):.1f} %"

    parts = []
    if "converged" in scalars:
        parts.append(f"converged {percent('converged')} of the training tokens, {percent('converged_val')} held out")
    if "effective_rank/val" in scalars:
        parts.append(
            f"effective rank {percent('effective_rank/train')} of the width, held out {percent('effective_rank/val')}"
            f" (untrained {percent('effective_rank/random_init_val')}, published initialisation"
            f" {percent('effective_rank/published_init_val')}, Gaussian {percent('effective_rank/gaussian')})"
        )
        parts.append(
            f"final_diff {scalars['final_diff']:.2g} (untrained {scalars['final_diff/random_init']:.2g}, published"
            f" initialisation {scalars['final_diff/published_init']:.2g}; norm {scalars['norm']:.3g})"
        )
    if "loss" in scalars:
        parts.append(f"val {scalars['loss']:.3f}")
        names = {"ppl": "ppl", "unigram_ppl": "unigram", "context_zero_ppl": "same weights, context at zero"}
        parts += [f"{words} {scalars[name]:.4g}" for name, words in names.items() if name in scalars]
        parts += [f"accuracy {percent('accuracy')}"] if "accuracy" in scalars else []
    return " | ".join(parts)
