"""All measures of contexts at fixed weights, beside those of weights that were not trained: the entry of this package.

The system keeps one `ContextMeasures` for a process:

    measures = ContextMeasures(config, documents, untrained)
    measures.evaluate(reader, sync_point)      an evaluation in training: scalars and curves
    measures.suite(reader, sync_point)         with the probe, the criteria and all training tokens
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config import RunConfig
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation
from pipeline.systems.cvfp.documents import DocumentSet
from pipeline.systems.cvfp.evaluation.reader import Reads

Untrained = Callable[[bool], Reads]
"""The same model with the weights that it begins with, of its own config (False) or as published (True). Collective."""


class ContextMeasures:
    """Measures of one run, and the baselines, which are measured once."""

    def __init__(self, config: RunConfig, documents: DocumentSet, untrained: Untrained) -> None: ...

    def evaluate(self, reader: Reads, sync_point: SyncPoint) -> Evaluation:
        """Scalars `effective_rank/...` (shares of the width, at equal numbers of tokens: train, val,
        random_init_train, random_init_val, published_init_train, published_init_val, gaussian), `final_diff` and
        `final_diff_relative` (of the norm) with `.../random_init` and `.../published_init`, `norm`, `sparsity`,
        `embedding_cosine`, `identity_cosine`, and `attractor` (1 or 0); curves of these. Collective."""
        ...

    def suite(self, reader: Reads, sync_point: SyncPoint) -> Evaluation:
        """As `evaluate`, with the probe (`probe/context`, `probe/embedding`), the rank over all training tokens
        (`effective_rank/train_all`), growth per token, and the table `criteria`. Collective."""
        ...
