"""What the system is asked to evaluate of its contexts, in training and by `eval --suite contexts`."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.config import RunConfig
from pipeline.evaluation_result import Evaluation, together
from pipeline.host.hardware import peak_memory
from pipeline.parallel.collectives import all_gather_object
from pipeline.runtime.sync import SyncPoint
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.evaluation.control import CONTROL, LABELS, MODEL, compared, right
from pipeline.systems.cvfp.evaluation.criteria import criteria_table
from pipeline.systems.cvfp.evaluation.measures import UNTRAINED, ContextMeasures
from pipeline.systems.cvfp.evaluation.prediction import nats_by_row
from pipeline.systems.cvfp.evaluation.reader import Reads
from pipeline.systems.cvfp.fixed_point.convergence import convergence
from pipeline.systems.cvfp.model.reader import Reader
from pipeline.systems.cvfp.phase import Data
from pipeline.systems.cvfp.untrained import untrained_reader

HISTORIES = {
    "convergence": (
        "converged", "converged_val", "converged_pass_to_pass", "converged/random_init", "converged_val/random_init",
    ),
    "rank_by_step": (
        "effective_rank/train", "effective_rank/val", "effective_rank/random_init_val",
        "effective_rank/published_init_val", "effective_rank/gaussian",
    ),
    "distance": ("distance", "diversity/variance", "diversity/covariance", "diversity/log_det"),
    "norm_by_step": ("norm", "norm/random_init"),
    "perplexity": ("ppl", "unigram_ppl", "context_zero_ppl"),
    "accuracy": ("accuracy", "unigram_accuracy"),
}  # fmt: skip
"""What is drawn over the steps of a run."""
CRITERIA = "criteria"
"""The name of the table of criteria."""


class ContextEvaluation:
    """Of one run, whose system keeps it: baselines are measured once."""

    def __init__(self, config: RunConfig, data: Data) -> None:
        assert isinstance(config.model, CvfpConfig)
        self.config, self.sizes, self.data = config, config.model, data
        self.measures = ContextMeasures(config, data.documents, self._untrained)
        self._model: nn.Module | None = None
        self._convergence: dict[str, dict[str, float]] = {}

    def evaluate(self, model: nn.Module, sync_point: SyncPoint, found: Evaluation) -> Evaluation:
        """What `ContextMeasures.evaluate` finds, beside what is `found` already, such as the share of converged tokens,
        and that share of the weights that the run begins with. Collective; raises UserError."""
        whole = together(found, self.measures.evaluate(self._reader(model), sync_point))
        return together(whole, Evaluation(self._convergence_of("random_init", sync_point)))

    def suite(self, model: nn.Module, sync_point: SyncPoint, found: Evaluation) -> Evaluation:
        """As `evaluate`, of `ContextMeasures.suite`, with the share of converged tokens of the published initialisation
        too, and the table of criteria. Collective; raises UserError."""
        whole = together(found, self.measures.suite(self._reader(model), sync_point))
        for name in UNTRAINED:
            whole.scalars.update(self._convergence_of(name, sync_point))
        wanted, peak = self.sizes.fixed_point.converged, max(all_gather_object(sync_point.topology, peak_memory()))
        whole.tables[CRITERIA] = criteria_table(whole.scalars, converged=wanted, peak_bytes=peak)
        return whole

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
            sums[CONTROL], sums[right(CONTROL)] = of_control[MODEL], of_control[right(MODEL)]
        return compared(sums)

    def _convergence_of(self, name: str, sync_point: SyncPoint) -> dict[str, float]:
        """What `convergence` finds of untrained weights, of the same tokens as of trained ones: once in a process, as
        it takes two passes over all of them. Collective at the first call."""
        if name not in self._convergence:
            reader, threshold = self._untrained(UNTRAINED[name]), self.sizes.fixed_point.threshold
            self._convergence[name] = {
                f"{scalar}{side}/{name}": value
                for side, loader in (
                    ("", self.data.training(sync_point.topology)), ("_val", self.data.held_out(sync_point.topology))
                )
                for scalar, value in convergence(reader, loader, threshold, sync_point).items()
            }  # fmt: skip
        return self._convergence[name]

    def _reader(self, model: nn.Module) -> Reads:
        self._model = model
        return Reader(model, self.sizes.width, exact=True)

    def _untrained(self, published: bool) -> Reader:
        assert self._model is not None
        return untrained_reader(self._model, self.sizes, self.config.seed, published=published)
