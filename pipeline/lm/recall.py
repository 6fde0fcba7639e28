"""The recall task: held-out share of right answers, by the distance from a pair to the query for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from pipeline.data.batch import IGNORED
from pipeline.data.synthetic import recall_gaps
from pipeline.data_config import RecallConfig
from pipeline.lm.documents import DocumentSums, documents_per_bin, interval
from pipeline.lm.held_out import BinSums, Evaluated, Modes, first_mode, run_held_out, scalar_prefix
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Curve, Evaluation, Phase

GAP_BIN = 20
"""Tokens of distance that share one bin of the recall curve."""


def evaluate_recall(
    system: Evaluated,
    model: nn.Module,
    phase: Phase,
    sync_point: SyncPoint,
    modes: Modes,
    task: RecallConfig,
    *,
    edges: Mapping[str, float],
) -> Evaluation:
    """Loss and share of right answers in every mode, and the curve `recall_by_distance`. Collective.

    `edges`: the curve's vertical lines, in tokens by label.
    """
    bins = task.max_gap // GAP_BIN + 1
    scalars: dict[str, float] = {}
    series = {}
    documents = DocumentSums(bins)
    for mode, options in modes.items():
        results = run_held_out(system, model, phase, sync_point, {**options, "predict": True})
        total = BinSums.zeros(bins, results[0][1].device)
        for batch, losses, predictions in results:
            assert predictions is not None
            local = sync_point.topology.shard(batch.labels.shape[1])
            labels = batch.labels[:, local]
            place = recall_gaps(batch.input_ids, batch.labels)[:, local] // GAP_BIN
            counted, right = labels != IGNORED, predictions == labels
            total.add(place, losses, counted, right)
            values = {mode: right, "labels": counted} if mode == first_mode(modes) else {mode: right}
            documents.add(batch.streams, batch.segment_ids[:, local], place, counted, values)
        total.reduce()
        prefix = scalar_prefix(modes, mode)
        answers = float(total.labels.sum())
        scalars[f"{prefix}loss"] = float(total.nats.sum()) / max(1.0, answers)
        scalars[f"{prefix}ppl"] = math.exp(min(scalars[f"{prefix}loss"], 700.0))
        scalars[f"{prefix}recall"] = float(total.right.sum()) / max(1.0, answers)
        series[mode] = tuple((total.right / total.labels).tolist())
    sums = documents.gather(sync_point.topology)
    curve = Curve(
        "Recall by distance",
        "tokens from a pair to its query (upper edge)",
        "share of right answers",
        tuple(float((index + 1) * GAP_BIN) for index in range(bins)),
        series,
        upper_edges=True,
        intervals={mode: interval(sums, partial(_share, mode)) for mode in modes},
        counts=tuple(sums["labels"].sum(0).long().tolist()),
        documents=documents_per_bin(sums["labels"]),
        levels={f"chance, 1 in {task.values}": 1 / task.values},
        edges=dict(edges),
    )
    scalars["documents"] = float(sums["labels"].shape[0])
    return Evaluation(scalars, {"recall_by_distance": curve})


def _share(mode: str, sums: Mapping[str, Tensor]) -> Tensor:
    """Share of right answers per bin, of sums over documents."""
    return sums[mode] / sums["labels"]
