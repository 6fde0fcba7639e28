"""Recall by distance in text: what a passage costs that stood in the document before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.lm.documents import DocumentSums, documents_per_bin, interval
from pipeline.lm.held_out import Evaluated, Modes, first_mode, run_as
from pipeline.parallel.collectives import shared_errors
from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.system import Curve, Phase, StepContext

PASSAGE = 64
"""Tokens of a passage that is repeated in held-out text."""
CUE = 8
"""Tokens at the start of a repeated passage that are not counted."""


def repeated_passages(
    system: Evaluated,
    model: nn.Module,
    phase: Phase,
    sync_point: SyncPoint,
    modes: Modes,
    *,
    edges: Mapping[str, float],
) -> Curve | None:
    """Nats per token of a held-out passage that stood in the document before, by the distance between the two.

    What a model that recalls nothing pays for the second copy, it paid for the first, but for the longer context. None
    where a sequence is too short to hold two passages. Collective.

    `edges`: the distances, in tokens by label, from which on a model does not see; the curve's vertical lines.
    """
    device = next(model.parameters()).device
    with shared_errors(sync_point.topology):
        loader = system.held_out(phase, sync_point.topology)
    first = next_step(loader, sync_point, "evaluation")[0]
    tokens = first.input_ids
    rows, length = tokens.shape
    gaps = [PASSAGE * 2**index for index in range(32) if PASSAGE * (2**index + 2) <= length]
    if not gaps:
        return None
    topology = sync_point.topology
    context, grain = StepContext(topology, system.config.seed, "evaluation", 1), PASSAGE * topology.sequence
    documents = DocumentSums(len(gaps))
    runs: dict[tuple[str, int], Tensor] = {}
    for mode, same in run_as(modes).items():
        for index, gap in enumerate(gaps):
            # The filler is the text that follows the passage, and the passage then comes again.
            start = PASSAGE + gap
            # What follows the copy has no part in it.
            used = min(length, -(-(start + PASSAGE) // grain) * grain)
            local = topology.shard(used)
            ids = torch.cat([tokens[:, :start], tokens[:, :PASSAGE], tokens[:, start : used - PASSAGE]], dim=1)
            labels = torch.full_like(ids, IGNORED)
            # The first few tokens of the copy only show that it is one.
            for copy in (0, start):
                labels[:, copy + CUE : copy + PASSAGE - 1] = ids[:, CUE + 1 : PASSAGE]
            positions = torch.arange(used).expand(rows, -1)
            batch = TokenBatch(ids, labels, torch.zeros_like(ids), positions, torch.arange(rows)).to(device)
            if (same, index) not in runs:
                # Lengths and modes are the config's, so every rank comes here equally often; a stop waits for one.
                sync_point("evaluation")
                output = system.forward(model, batch, {}, dataclasses.replace(context, options=modes[same]))
                runs[same, index] = output.tokens["losses"]
            in_copy = batch.positions[:, local] >= start
            place, segments = torch.full_like(batch.positions, index)[:, local], batch.segment_ids[:, local]
            losses, counted = runs[same, index], batch.labels[:, local] != IGNORED
            values = {mode: losses * in_copy, f"{mode}, first": losses * ~in_copy}
            values |= {"labels": in_copy} if mode == first_mode(modes) else {}
            documents.add(first.streams.to(device), segments, place, counted, values)
    sums = documents.gather(sync_point.topology)
    # What predicts a token of the copy looks for it a passage further back than the gap.
    further = PASSAGE - 1
    total = {name: value.sum(0) for name, value in sums.items()}
    return Curve(
        "Recall by distance: a repeated passage",
        "tokens between a passage and its copy",
        "nats per token of the copy",
        tuple(map(float, gaps)),
        {mode: tuple((total[mode] / total["labels"]).tolist()) for mode in modes}
        | {f"saved, {mode}": tuple(_saved(mode, total).tolist()) for mode in modes},
        log_x=True,
        drawn=tuple(f"saved, {mode}" for mode in modes),
        drawn_label="nats per token saved\nagainst the first copy",
        intervals={f"saved, {mode}": interval(sums, partial(_saved, mode)) for mode in modes},
        counts=tuple(total["labels"].long().tolist()),
        documents=documents_per_bin(sums["labels"]),
        levels={"nothing saved": 0.0},
        edges={label: tokens - further for label, tokens in edges.items() if tokens > further},
    )


def _saved(mode: str, sums: Mapping[str, Tensor]) -> Tensor:
    """Nats per token that the copy costs less than the first, per bin, of sums over documents."""
    return (sums[f"{mode}, first"] - sums[mode]) / sums["labels"]
