"""All measures of contexts at fixed weights, beside those of weights that were not trained: the entry of this package.

The system keeps one `ContextMeasures` for a process:

    measures = ContextMeasures(config, documents, untrained)
    measures.evaluate(reader, sync_point)      an evaluation in training: scalars and curves
    measures.suite(reader, sync_point)         with the probe, all training tokens, and what the criteria ask for
"""

from __future__ import annotations

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.documents import DocumentSet
from pipeline.systems.cvfp.evaluation import pictures
from pipeline.systems.cvfp.evaluation.baselines import Measured, Untrained, gaussian_figures, measure
from pipeline.systems.cvfp.evaluation.checks import is_attractor
from pipeline.systems.cvfp.evaluation.pieces import Reading
from pipeline.systems.cvfp.evaluation.rank import gaussian_rank, gaussian_values
from pipeline.systems.cvfp.evaluation.reader import Reads
from pipeline.systems.cvfp.evaluation.whole import Whole, measure_whole

MOST = 32_768
"""Tokens of either side of the hold-out that are measured in training: the first ones."""
UNTRAINED = {"random_init": False, "published_init": True}
"""The baselines by name, and whether their weights are the published initialisation's."""


class ContextMeasures:
    """Measures of one run, and the baselines, which are measured once."""

    def __init__(self, config: RunConfig, documents: DocumentSet, untrained: Untrained) -> None:
        assert isinstance(config.model, CvfpConfig)
        self.config, self.sizes, self.documents, self.untrained = config, config.model, documents, untrained
        rows = config.evaluation.batch_size or config.batch_size
        self.reading = Reading(documents, self.sizes.carry, rows, config.sequence_length)
        self._baselines: dict[str, Measured] = {}
        self._whole: dict[str, Whole] = {}

    @property
    def tokens(self) -> int:
        """How many tokens of each side of the hold-out are measured: as many of training as of validation, since the
        effective rank grows with their number. Raises UserError where there is none."""
        available = [self.reading.available(training=training) for training in (True, False)]
        if not min(available):
            side = "held out" if available[0] else "trained on"
            raise UserError(
                f"{self.documents.name}: no token is {side}: give more documents, or another --data.holdout"
            )
        return min(*available, MOST)

    def evaluate(self, reader: Reads, sync_point: SyncPoint) -> Evaluation:
        """Scalars `effective_rank/...` (shares of the width, at equal numbers of tokens: train, val,
        random_init_train, random_init_val, published_init_train, published_init_val, gaussian); `final_diff`,
        `final_diff_relative` (of the norm), `norm`, `spread`, `distance_of_contexts`, `cosine_of_contexts`, `sparsity`,
        `embedding_cosine` and `identity_cosine`, each also as `.../random_init` and `.../published_init`; most, and
        what `convergence` finds, also as `.../gaussian`; `attractor` (1: all contexts are one, or zero). Curves of
        these. Collective; raises UserError."""
        found = measure(reader, self.reading, self.tokens, sync_point)
        baselines = self.baselines(sync_point)
        width = reader.width
        scalars = found.figures()
        for name, other in baselines.items():
            for key, value in other.figures().items():
                scalars[_beside(key, name)] = value
        gaussian = gaussian_values(found.val.count, width)
        threshold = self.sizes.fixed_point.threshold
        independent = gaussian_figures(found.val.count, width, threshold)
        for key, value in independent.items():
            scalars[f"{key}/gaussian"] = value
        scalars["effective_rank/tokens"] = float(found.val.count)
        scalars["attractor"] = float(is_attractor(scalars))
        named = {"trained": found, **{name.replace("_", " "): other for name, other in baselines.items()}}
        curves = pictures.all_of(named, gaussian, independent, threshold)
        return Evaluation(scalars, curves)

    def suite(self, reader: Reads, sync_point: SyncPoint) -> Evaluation:
        """As `evaluate`, with `probe/context` and `probe/embedding` (shares of held-out tokens whose token two back a
        linear map names), their `probe/ratio`, `probe/most_frequent`, and
        `effective_rank/train_all` over all training tokens, all for the baselines as well; `tokens/train` and
        `tokens/val`, which are read of each side of the hold-out. Collective; raises UserError."""
        own = self.evaluate(reader, sync_point)
        tokens, scalars = self.reading.available(training=True), dict(own.scalars)
        scalars["effective_rank/gaussian_train_all"] = gaussian_rank(tokens, reader.width) / reader.width
        scalars["tokens/train"], scalars["tokens/val"] = float(tokens), float(self.reading.available(training=False))
        found = measure_whole(reader, self.reading, sync_point)
        scalars |= found.figures()
        probes = {"trained": (found.context, found.embedding)}
        for name, published in UNTRAINED.items():
            if name not in self._whole:
                self._whole[name] = measure_whole(self.untrained(published), self.reading, sync_point)
            other = self._whole[name]
            scalars |= {_beside(key, name): value for key, value in other.figures().items()}
            probes[name.replace("_", " ")] = other.context, other.embedding
        curves = {**own.curves, "probe": pictures.probe_curve(probes)}
        return Evaluation(scalars, curves)

    def baselines(self, sync_point: SyncPoint) -> dict[str, Measured]:
        """The measures of weights that were not trained. Collective at the first call."""
        for name, published in UNTRAINED.items():
            if name not in self._baselines:
                self._baselines[name] = measure(self.untrained(published), self.reading, self.tokens, sync_point)
        return self._baselines


def _beside(scalar: str, baseline: str) -> str:
    """The name of a baseline's scalar."""
    kind, _, data = scalar.partition("/")
    return f"{kind}/{baseline}_{data}" if kind == "effective_rank" else f"{scalar}/{baseline}"
