"""Held-out evaluation: perplexity by position and recall by distance, with the memory on and off."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.batch import IGNORED, Batch
from pipeline.data.synthetic import recall_gaps
from pipeline.parallel.collectives import shared_errors
from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.system import Carry, Curve, Evaluation, StepContext
from pipeline.systems.miras.documents import DocumentSums, documents_per_bin, interval
from pipeline.systems.miras.evaluated import Evaluated, reach
from pipeline.systems.miras.passages import repeated_passages

ON, OFF = "memory on", "memory off"
RATIO = "memory off / on"
"""Series of the curves."""
FIRST_BIN = 16
"""Positions below this share one bin; above, each bin doubles."""
GAP_BIN = 20
"""Tokens of distance that share one bin of the recall curve."""


@dataclass
class _Sums:
    """Per bin, float64: nats, counted labels, right answers."""

    nats: Tensor
    labels: Tensor
    right: Tensor

    @classmethod
    def zeros(cls, bins: int, device: torch.device) -> _Sums:
        return cls(*(torch.zeros(bins, dtype=torch.float64, device=device) for _ in range(3)))

    def add(self, bins: Tensor, losses: Tensor, counted: Tensor, right: Tensor) -> None:
        index = bins.clamp(0, self.nats.numel() - 1)[counted]
        self.nats.index_add_(0, index, losses[counted].double())
        self.labels.index_add_(0, index, torch.ones_like(index, dtype=torch.float64))
        self.right.index_add_(0, index, right[counted].double())

    def reduce(self) -> None:
        for tensor in (self.nats, self.labels, self.right):
            if dist.is_initialized():
                dist.all_reduce(tensor)


def position_bins(positions: Tensor) -> Tensor:
    """Bin of each document position: 0 below FIRST_BIN, then one per doubling."""
    return (positions.clamp_min(1).double() / FIRST_BIN).log2().floor().add(1).clamp_min(0).long()


@torch.no_grad()
def evaluate(system: Evaluated, model: nn.Module, sync_point: SyncPoint) -> Evaluation:
    """Held-out loss and curves; the same held-out rows every time. Leaves the model's mode as it found it."""
    was_training = model.training
    model.eval()
    try:
        modes = {ON: True}
        if system.sizes.memory.layers:
            modes[OFF] = False
        if system.sizes.recall is not None:
            return _recall(system, model, sync_point, modes)
        return _perplexity(system, model, sync_point, modes)
    finally:
        model.train(was_training)


def _run(
    system: Evaluated, model: nn.Module, sync_point: SyncPoint, memory: bool, predict: bool
) -> list[tuple[Batch, Tensor, Tensor | None]]:
    """Held-out micro-batches with this rank's losses and predictions [rows, T / degree]."""
    device = next(model.parameters()).device
    with shared_errors(sync_point.topology):
        loader = system.held_out(sync_point.topology)
    results = []
    carries: dict[int, Carry] = {}
    for step in range(1, system.config.evaluation.steps + 1):
        context = StepContext(
            sync_point.topology, system.config.seed, "evaluation", step, {"memory": memory, "predict": predict}
        )
        for micro, batch in enumerate(next_step(loader, sync_point, "evaluation")):
            batch = batch.to(device)
            output = system.forward(model, batch, carries.get(micro, {}), context)
            carries[micro] = output.carry
            results.append((batch, output.tokens["losses"], output.tokens.get("predictions")))
    return results


def _perplexity(system: Evaluated, model: nn.Module, sync_point: SyncPoint, modes: dict[str, bool]) -> Evaluation:
    with shared_errors(sync_point.topology):
        byte_lengths = system.byte_lengths()
    last = torch.tensor([system.config.sequence_length * system.config.evaluation.steps])
    bins = int(position_bins(last).item()) + 1
    sums: dict[str, _Sums] = {}
    documents = DocumentSums(bins)
    length = 0.0
    for mode, memory in modes.items():
        results = _run(system, model, sync_point, memory, predict=False)
        device = results[0][1].device
        sums[mode] = _Sums.zeros(bins, device)
        covered = torch.zeros((), dtype=torch.float64, device=device)
        for batch, losses, _ in results:
            local = sync_point.topology.shard(batch.labels.shape[1])
            labels, place = batch.labels[:, local], position_bins(batch.positions[:, local])
            counted = labels != IGNORED
            sums[mode].add(place, losses, counted, torch.zeros_like(counted))
            values = {mode: losses, "labels": counted} if memory else {mode: losses}
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
        prefix = "" if mode == ON else "memory_off/"
        loss = nats / max(1.0, counted_labels)
        scalars[f"{prefix}loss"] = loss
        scalars[f"{prefix}ppl"] = math.exp(min(loss, 700.0))
        if length:
            scalars[f"{prefix}bpb"] = nats / math.log(2) / length
        series[mode] = tuple((total.nats / total.labels).exp().tolist())
    scalars["labels"] = float(sums[ON].labels.sum())
    scalars["documents"] = float(found["labels"].shape[0])
    curves = {"perplexity_by_position": _by_position(system, series, found)}
    repeated = repeated_passages(system, model, sync_point, modes)
    if repeated is not None:
        curves["recall_by_distance"] = repeated
    return Evaluation(scalars, curves)


def _by_position(system: Evaluated, series: dict[str, tuple[float, ...]], sums: dict[str, Tensor]) -> Curve:
    """Perplexity per bin of positions, and what it is without the memory over what it is with it."""
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
        edges=reach(system.sizes, system.backbone.num_hidden_layers),
    )
    if OFF not in series:
        return curve

    def ratio(total: Mapping[str, Tensor]) -> Tensor:
        return ((total[OFF] - total[ON]) / total["labels"]).exp()

    return dataclasses.replace(
        curve,
        series={**series, RATIO: tuple(ratio({name: value.sum(0) for name, value in sums.items()}).tolist())},
        drawn=(RATIO,),
        drawn_label=f"perplexity, {RATIO}",
        intervals={RATIO: interval(sums, ratio)},
        levels={"no difference": 1.0},
    )


def _recall(system: Evaluated, model: nn.Module, sync_point: SyncPoint, modes: dict[str, bool]) -> Evaluation:
    task = system.sizes.recall
    assert task is not None
    bins = task.max_gap // GAP_BIN + 1
    scalars: dict[str, float] = {}
    series = {}
    documents = DocumentSums(bins)
    for mode, memory in modes.items():
        results = _run(system, model, sync_point, memory, predict=True)
        total = _Sums.zeros(bins, results[0][1].device)
        for batch, losses, predictions in results:
            assert predictions is not None
            local = sync_point.topology.shard(batch.labels.shape[1])
            labels = batch.labels[:, local]
            place = recall_gaps(batch.input_ids, batch.labels)[:, local] // GAP_BIN
            counted, right = labels != IGNORED, predictions == labels
            total.add(place, losses, counted, right)
            values = {mode: right, "labels": counted} if memory else {mode: right}
            documents.add(batch.streams, batch.segment_ids[:, local], place, counted, values)
        total.reduce()
        prefix = "" if mode == ON else "memory_off/"
        answers = float(total.labels.sum())
        scalars[f"{prefix}loss"] = float(total.nats.sum()) / max(1.0, answers)
        scalars[f"{prefix}ppl"] = math.exp(min(scalars[f"{prefix}loss"], 700.0))
        scalars[f"{prefix}recall"] = float(total.right.sum()) / max(1.0, answers)
        series[mode] = tuple((total.right / total.labels).tolist())
    sums = documents.gather(sync_point.topology)

    def share(mode: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
        return lambda total: total[mode] / total["labels"]

    curve = Curve(
        "Recall by distance",
        "tokens from a pair to its query (upper edge)",
        "share of right answers",
        tuple(float((index + 1) * GAP_BIN) for index in range(bins)),
        series,
        upper_edges=True,
        intervals={mode: interval(sums, share(mode)) for mode in modes},
        counts=tuple(sums["labels"].sum(0).long().tolist()),
        documents=documents_per_bin(sums["labels"]),
        levels={f"chance, 1 in {task.values}": 1 / task.values},
        edges=reach(system.sizes, system.backbone.num_hidden_layers),
    )
    scalars["documents"] = float(sums["labels"].shape[0])
    return Evaluation(scalars, {"recall_by_distance": curve})
