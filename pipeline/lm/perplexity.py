"""Held-out perplexity, whole and by the position in the document."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.lm.documents import DocumentSums, documents_per_bin, interval
from pipeline.lm.held_out import BinSums, Evaluated, Modes, first_mode, run_as, run_held_out, scalar_prefix
from pipeline.parallel.collectives import shared_errors
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Curve, Evaluation, Phase

FIRST_BIN = 16
"""Positions below this share one bin; above, each bin doubles."""


def position_bins(positions: Tensor) -> Tensor:
    """Bin of each document position: 0 below FIRST_BIN, then one per doubling."""
    return (positions.clamp_min(1).double() / FIRST_BIN).log2().floor().add(1).clamp_min(0).long()


def evaluate_perplexity(
    system: Evaluated,
    model: nn.Module,
    phase: Phase,
    sync_point: SyncPoint,
    modes: Modes,
    *,
    edges: Mapping[str, float],
    ratios: Mapping[str, tuple[str, str]],
) -> Evaluation:
    """Loss, perplexity and bits per byte in every mode, and the curve `perplexity_by_position`. Collective.

    `edges`: the curve's vertical lines, in tokens by label. `ratios`: by label, two modes whose perplexities are
    divided; where there are any, they are what is drawn.
    """
    with shared_errors(sync_point.topology):
        byte_lengths = system.byte_lengths()
    last = torch.tensor([system.config.sequence_length * system.config.evaluation.steps])
    bins = int(position_bins(last).item()) + 1
    sums: dict[str, BinSums] = {}
    documents = DocumentSums(bins)
    length = 0.0
    runs: dict[str, list[tuple[TokenBatch, Tensor, Tensor | None]]] = {}
    for mode, same in run_as(modes).items():
        if same not in runs:
            runs[same] = run_held_out(system, model, phase, sync_point, {**modes[same], "predict": False})
        results = runs[same]
        device = results[0][1].device
        sums[mode] = BinSums.zeros(bins, device)
        covered = torch.zeros((), dtype=torch.float64, device=device)
        for batch, losses, _ in results:
            local = sync_point.topology.shard(batch.labels.shape[1])
            labels, place = batch.labels[:, local], position_bins(batch.positions[:, local])
            counted = labels != IGNORED
            sums[mode].add(place, losses, counted, torch.zeros_like(counted))
            values = {mode: losses, "labels": counted} if mode == first_mode(modes) else {mode: losses}
            documents.add(batch.streams, batch.segment_ids[:, local], place, counted, values)
            if byte_lengths is not None:
                covered += byte_lengths.to(device)[labels[counted]].sum()
        sums[mode].reduce()
        if dist.is_initialized():
            dist.all_reduce(covered)
        length = float(covered)
    found = documents.gather(sync_point.topology)
    scalars: dict[str, float] = {}
    series = {}
    for mode, total in sums.items():
        nats, counted_labels = float(total.nats.sum()), float(total.labels.sum())
        prefix = scalar_prefix(modes, mode)
        loss = nats / max(1.0, counted_labels)
        scalars[f"{prefix}loss"] = loss
        scalars[f"{prefix}ppl"] = math.exp(min(loss, 700.0))
        if length:
            scalars[f"{prefix}bpb"] = nats / math.log(2) / length
        series[mode] = tuple((total.nats / total.labels).exp().tolist())
    scalars["labels"] = float(sums[first_mode(modes)].labels.sum())
    scalars["documents"] = float(found["labels"].shape[0])
    return Evaluation(scalars, {"perplexity_by_position": _by_position(series, found, edges, ratios)})


def _by_position(
    series: dict[str, tuple[float, ...]],
    sums: dict[str, Tensor],
    edges: Mapping[str, float],
    ratios: Mapping[str, tuple[str, str]],
) -> Curve:
    """Perplexity per bin of positions, and the ratios of what it is in two modes."""
    counts = sums["labels"].sum(0)
    curve = Curve(
        "Perplexity by position",
        "position in the document (tokens, upper edge)",
        "perplexity",
        tuple(float(FIRST_BIN * 2**index) for index in range(counts.numel())),
        series,
        log_x=True,
        upper_edges=True,
        counts=tuple(counts.long().tolist()),
        documents=documents_per_bin(sums["labels"]),
        edges=dict(edges),
    )
    if not ratios:
        return curve
    whole = {name: value.sum(0) for name, value in sums.items()}
    return dataclasses.replace(
        curve,
        series={**series, **{label: tuple(_ratio(*pair, whole).tolist()) for label, pair in ratios.items()}},
        drawn=tuple(ratios),
        drawn_label=f"perplexity, {', '.join(ratios)}",
        intervals={label: interval(sums, partial(_ratio, *pair)) for label, pair in ratios.items()},
        levels={"no difference": 1.0},
    )


def _ratio(over: str, under: str, sums: Mapping[str, Tensor]) -> Tensor:
    """Perplexity in the mode `over` divided by that in the mode `under`, per bin, of sums over documents."""
    return ((sums[over] - sums[under]) / sums["labels"]).exp()
