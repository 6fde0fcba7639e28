"""Held-out evaluation: perplexity by position and recall by distance, with the memory on and off."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.synthetic import recall_gaps
from pipeline.parallel.agreement import together
from pipeline.parallel.pulse import Pulse, next_step
from pipeline.system import IGNORED, Batch, Carry, Curve, Evaluation, StepContext

if TYPE_CHECKING:
    from pipeline.systems.miras.system import MirasSystem

FIRST_BIN = 16
"""Positions below this share one bin; above, each bin doubles."""
PASSAGE = 64
"""Tokens of a passage that is repeated in held-out text."""
CUE = 8
"""Tokens at the start of a repeated passage that are not counted."""
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
def evaluate(system: MirasSystem, model: nn.Module, pulse: Pulse) -> Evaluation:
    """Held-out loss and curves; the same held-out rows every time. Leaves the model's mode as it found it."""
    was_training = model.training
    model.eval()
    try:
        modes = {"memory on": True}
        if system.sizes.memory.layers:
            modes["memory off"] = False
        if system.sizes.recall is not None:
            return _recall(system, model, pulse, modes)
        return _perplexity(system, model, pulse, modes)
    finally:
        model.train(was_training)


def _run(
    system: MirasSystem, model: nn.Module, pulse: Pulse, memory: bool, predict: bool
) -> list[tuple[Batch, Tensor, Tensor | None]]:
    """Held-out micro-batches with this rank's losses and predictions [rows, T / degree]."""
    device = next(model.parameters()).device
    loader = together(pulse.topology, lambda: system.held_out(pulse.topology))
    results = []
    carries: dict[int, Carry] = {}
    for step in range(1, system.config.evaluation.steps + 1):
        context = StepContext(
            pulse.topology, system.config.seed, "evaluation", step, {"memory": memory, "predict": predict}
        )
        for micro, batch in enumerate(next_step(loader, pulse, "evaluation")):
            batch = batch.to(device)
            output = system.forward(model, batch, carries.get(micro, {}), context)
            carries[micro] = output.carry
            results.append((batch, output.tokens["losses"], output.tokens.get("predictions")))
    return results


def _perplexity(system: MirasSystem, model: nn.Module, pulse: Pulse, modes: dict[str, bool]) -> Evaluation:
    byte_lengths = together(pulse.topology, system.byte_lengths)
    bins = position_bins(torch.tensor([system.config.sequence_length * system.config.evaluation.steps])).item() + 1
    sums: dict[str, _Sums] = {}
    length = 0.0
    for mode, memory in modes.items():
        results = _run(system, model, pulse, memory, predict=False)
        device = results[0][1].device
        sums[mode] = _Sums.zeros(int(bins), device)
        covered = torch.zeros((), dtype=torch.float64, device=device)
        for batch, losses, _ in results:
            mine = pulse.topology.shard(batch.labels.shape[1])
            labels, positions = batch.labels[:, mine], batch.positions[:, mine]
            counted = labels != IGNORED
            sums[mode].add(position_bins(positions), losses, counted, torch.zeros_like(counted))
            if byte_lengths is not None:
                covered += byte_lengths.to(device)[labels[counted]].sum()
        sums[mode].reduce()
        if dist.is_initialized():
            dist.all_reduce(covered)
        length = float(covered)
    edges = [float(FIRST_BIN * 2**index) for index in range(int(bins))]
    scalars: dict[str, float] = {}
    series = {}
    for mode, total in sums.items():
        nats, counted_labels = float(total.nats.sum()), float(total.labels.sum())
        prefix = "" if mode == "memory on" else "memory_off/"
        loss = nats / max(1.0, counted_labels)
        scalars[f"{prefix}loss"] = loss
        scalars[f"{prefix}ppl"] = math.exp(min(loss, 700.0))
        if length:
            scalars[f"{prefix}bpb"] = nats / math.log(2) / length
        series[mode] = tuple((total.nats / total.labels).exp().tolist())
    scalars["labels"] = float(sums["memory on"].labels.sum())
    curve = Curve(
        "Perplexity by position", "position in the document (tokens, upper edge)", "perplexity", tuple(edges), series,
        log_x=True,
    )  # fmt: skip
    curves = {"perplexity_by_position": curve}
    repeated = _repeated_passages(system, model, pulse, modes)
    if repeated is not None:
        curves["recall_by_distance"] = repeated
    return Evaluation(scalars, curves)


def _repeated_passages(system: MirasSystem, model: nn.Module, pulse: Pulse, modes: dict[str, bool]) -> Curve | None:
    """Nats per token of a held-out passage that stood in the document before, by the distance between the two.

    What a model that recalls nothing pays for the second copy, it paid for the first. None where a sequence is too
    short to hold two passages.
    """
    device = next(model.parameters()).device
    loader = together(pulse.topology, lambda: system.held_out(pulse.topology))
    tokens = next_step(loader, pulse, "evaluation")[0].input_ids
    rows, length = tokens.shape
    gaps = [PASSAGE * 2**index for index in range(32) if PASSAGE * (2**index + 2) <= length]
    if not gaps:
        return None
    context = StepContext(pulse.topology, system.config.seed, "evaluation", 1)
    series = {}
    for mode, memory in modes.items():
        values = []
        for gap in gaps:
            # The filler is the text that follows the passage, and the passage then comes again.
            start = PASSAGE + gap
            ids = torch.cat([tokens[:, :start], tokens[:, :PASSAGE], tokens[:, start : length - PASSAGE]], dim=1)
            labels = torch.full_like(ids, IGNORED)
            # The first few tokens of the copy only show that it is one.
            labels[:, start + CUE : start + PASSAGE - 1] = ids[:, start + CUE + 1 : start + PASSAGE]
            positions = torch.arange(length).expand(rows, -1)
            batch = Batch(ids, labels, torch.zeros_like(ids), positions, torch.arange(rows)).to(device)
            options = {"memory": memory}
            # Lengths and modes are the config's, so every rank comes here equally often; a stop waits for one of them.
            pulse("evaluation")
            output = system.forward(model, batch, {}, dataclasses.replace(context, options=options))
            totals = torch.stack([output.sums["cross_entropy"].double(), torch.zeros((), device=device).double()])
            totals[1] = (batch.labels[:, pulse.topology.shard(length)] != IGNORED).sum()
            if dist.is_initialized():
                dist.all_reduce(totals)
            values.append(float(totals[0] / totals[1]))
        series[mode] = tuple(values)
    return Curve(
        "Recall by distance",
        "tokens between a passage and its copy",
        "nats per token of the copy",
        tuple(map(float, gaps)),
        series,
        log_x=True,
    )


def _recall(system: MirasSystem, model: nn.Module, pulse: Pulse, modes: dict[str, bool]) -> Evaluation:
    assert system.sizes.recall is not None
    bins = system.sizes.recall.max_gap // GAP_BIN + 1
    scalars: dict[str, float] = {}
    series = {}
    for mode, memory in modes.items():
        results = _run(system, model, pulse, memory, predict=True)
        total = _Sums.zeros(bins, results[0][1].device)
        for batch, losses, predictions in results:
            assert predictions is not None
            mine = pulse.topology.shard(batch.labels.shape[1])
            labels = batch.labels[:, mine]
            gaps = recall_gaps(batch.input_ids, batch.labels)[:, mine]
            total.add(gaps // GAP_BIN, losses, labels != IGNORED, predictions == labels)
        total.reduce()
        prefix = "" if mode == "memory on" else "memory_off/"
        answers = float(total.labels.sum())
        scalars[f"{prefix}loss"] = float(total.nats.sum()) / max(1.0, answers)
        scalars[f"{prefix}ppl"] = math.exp(min(scalars[f"{prefix}loss"], 700.0))
        scalars[f"{prefix}recall"] = float(total.right.sum()) / max(1.0, answers)
        series[mode] = tuple((total.right / total.labels).tolist())
    edges = tuple(float((index + 1) * GAP_BIN) for index in range(bins))
    curve = Curve(
        "Recall by distance",
        "tokens from a pair to its query (upper edge)",
        "share of right answers",
        edges,
        series,
    )
    return Evaluation(scalars, {"recall_by_distance": curve})
