"""All measures of contexts at fixed weights, beside those of weights that were not trained: the entry of this package.

The system keeps one `ContextMeasures` for a process:

    measures = ContextMeasures(config, documents, untrained)
    measures.evaluate(reader, sync_point)      an evaluation in training: scalars and curves
    measures.suite(reader, sync_point)         with the probe, all training tokens, and what the criteria ask for
"""

from __future__ import annotations

import numpy as np
import torch

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.documents import DocumentSet
from pipeline.systems.cvfp.evaluation import pictures
from pipeline.systems.cvfp.evaluation.baselines import Measured, Untrained, gaussian_figures, measure, sums_of
from pipeline.systems.cvfp.evaluation.pieces import Piece, Reading, read
from pipeline.systems.cvfp.evaluation.probe import TUNING, Examples, ProbeResult, classes_of, fit_and_score
from pipeline.systems.cvfp.evaluation.rank import gaussian_rank, gaussian_values
from pipeline.systems.cvfp.evaluation.reader import Reads

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
        self._probes: dict[str, tuple[ProbeResult, ProbeResult]] = {}
        self._whole: dict[str, float] = {}
        """Effective rank of untrained weights over all training tokens, as a share of the width."""

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
        `embedding_cosine` and `identity_cosine`, each also as `.../random_init` and `.../published_init`; some, and
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
        for key, value in gaussian_figures(found.val.count, width, threshold).items():
            scalars[f"{key}/gaussian"] = value
        scalars["effective_rank/tokens"] = float(found.val.count)
        scalars["attractor"] = float(is_attractor(scalars))
        named = {"trained": found, **{name.replace("_", " "): other for name, other in baselines.items()}}
        curves = pictures.all_of(named, gaussian, threshold)
        return Evaluation(scalars, curves)

    def suite(self, reader: Reads, sync_point: SyncPoint) -> Evaluation:
        """As `evaluate`, with `probe/context` and `probe/embedding` (shares of held-out tokens whose token two back a
        linear map names), their `probe/ratio`, `probe/most_frequent`, and
        `effective_rank/train_all` over all training tokens, all for the baselines as well; `tokens/train` and
        `tokens/val`, which are read of each side of the hold-out. Collective; raises UserError."""
        own = self.evaluate(reader, sync_point)
        width, scalars = reader.width, dict(own.scalars)
        tokens = self.reading.available(training=True)
        for name, published in UNTRAINED.items():
            if name not in self._whole:
                self._whole[name] = self._whole_rank(self.untrained(published), sync_point)
            scalars[f"effective_rank/{name}_train_all"] = self._whole[name]
        scalars["effective_rank/train_all"] = self._whole_rank(reader, sync_point)
        scalars["effective_rank/gaussian_train_all"] = gaussian_rank(tokens, width) / width
        scalars["tokens/train"] = float(tokens)
        scalars["tokens/val"] = float(self.reading.available(training=False))
        probes = {"trained": self.probe(reader, sync_point)}
        for name, published in UNTRAINED.items():
            if name not in self._probes:
                self._probes[name] = self.probe(self.untrained(published), sync_point)
            probes[name.replace("_", " ")] = self._probes[name]
        for name, (context, embedding) in probes.items():
            figures = {
                "probe/context": context.accuracy,
                "probe/embedding": embedding.accuracy,
                "probe/ratio": context.accuracy / embedding.accuracy if embedding.accuracy else float("inf"),
                "probe/most_frequent": context.most_frequent,
            }
            for key, value in figures.items():
                scalars[key if name == "trained" else _beside(key, name.replace(" ", "_"))] = value
        curves = {**own.curves, "probe": pictures.probe_curve(probes)}
        return Evaluation(scalars, curves)

    def _whole_rank(self, reader: Reads, sync_point: SyncPoint) -> float:
        tokens = self.reading.available(training=True)
        return sums_of(reader, self.reading, tokens, sync_point, training=True).effective_rank() / reader.width

    def baselines(self, sync_point: SyncPoint) -> dict[str, Measured]:
        """The measures of weights that were not trained. Collective at the first call."""
        for name, published in UNTRAINED.items():
            if name not in self._baselines:
                self._baselines[name] = measure(self.untrained(published), self.reading, self.tokens, sync_point)
        return self._baselines

    def probe(self, reader: Reads, sync_point: SyncPoint) -> tuple[ProbeResult, ProbeResult]:
        """The probe on contexts, and on embeddings, of the same tokens. Collective."""
        sides = []
        for training in (True, False):
            pieces = list(read(reader, self.reading, self.tokens, sync_point, training=training))
            embedded = [reader.embedded(piece.ids) for piece in pieces]
            sides.append((pieces, embedded))
        (fitted, fitted_embedded), (held_out, held_out_embedded) = sides
        classes = classes_of(np.concatenate(self.reading.chosen(self.tokens, training=True)))

        def result(features: list[torch.Tensor], others: list[torch.Tensor]) -> ProbeResult:
            fitting, tuning = _examples(fitted, features, tuned=False), _examples(fitted, features, tuned=True)
            held = Examples.of(others, [piece.ids for piece in held_out], [piece.mask for piece in held_out])
            return fit_and_score(fitting, tuning, held, classes, sync_point.topology)

        contexts = [[piece.contexts for piece in pieces] for pieces in (fitted, held_out)]
        return result(*contexts), result(fitted_embedded, held_out_embedded)


def _examples(pieces: list[Piece], features: list[torch.Tensor], *, tuned: bool) -> Examples:
    """Those of every fifth row, or of the others."""
    chosen = []
    for piece in pieces:
        rows = piece.numbers % TUNING == TUNING - 1
        chosen.append(rows if tuned else ~rows)
    return Examples.of(
        [one[rows] for one, rows in zip(features, chosen, strict=True)],
        [piece.ids[rows] for piece, rows in zip(pieces, chosen, strict=True)],
        [piece.mask[rows] for piece, rows in zip(pieces, chosen, strict=True)],
    )


def _beside(scalar: str, baseline: str) -> str:
    """The name of a baseline's scalar."""
    kind, _, data = scalar.partition("/")
    return f"{kind}/{baseline}_{data}" if kind == "effective_rank" else f"{scalar}/{baseline}"


def is_attractor(scalars: dict[str, float]) -> bool:
    """Whether all contexts are about the same one (less than 0.1 apart, cosines above 0.99), or about zero: the checks
    of the prototype, with the root of the mean squared distance in place of the mean distance, which is not above it.
    """
    one = scalars["distance_of_contexts"] < 0.1 and scalars["cosine_of_contexts"] > 0.99
    return one or scalars["norm"] < 0.1
