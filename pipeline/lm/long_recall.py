"""Recall at long distances: a document is read once, through the carry, and asked at every distance on the way.

What is asked is read from a copy of the carry, which is then dropped: an answer that stood in the document would be
stored again, and later queries would find that one. Memory in use does not grow with the distance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.data.long_recall import document_head, fillers, generator, stored_pairs
from pipeline.data_config import RecallConfig
from pipeline.errors import UserError
from pipeline.host.hardware import peak_memory
from pipeline.lm.binomial import wilson
from pipeline.lm.held_out import Evaluated, Modes, first_mode, scalar_prefix
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, Curve, Evaluation, StepContext

QUERIES = 96
"""Least number of queries behind a point of a curve."""
PERIOD = 8
"""Tokens from one query to the next: key, value, then filler."""
PIECE = 2048
"""Least number of tokens that one forward pass reads; as many whole sequences as that takes."""
DISTANCES = (1024, 16_384, 65_536, 262_144, 1_048_576)
"""Tokens from the pairs to the queries, by default."""


@dataclasses.dataclass(frozen=True)
class Found:
    """Of one mode at one distance, summed over all documents: right answers, queries, nats of the right answers."""

    right: float
    queries: float
    nats: float

    @property
    def share(self) -> float:
        return self.right / self.queries


def ask_at_distances(
    system: Evaluated,
    model: nn.Module,
    sync_point: SyncPoint,
    modes: Modes,
    task: RecallConfig,
    distances: Sequence[int],
    *,
    queries: int = QUERIES,
) -> tuple[dict[str, list[Found]], list[int]]:
    """What each mode answers at each of the rising `distances`, and the most bytes held by any rank until then.

    Every pair is asked for once a document and distance; as many documents as make `queries` of them. Raises UserError
    for a distance within the list of pairs. Collective.
    """
    topology, device = sync_point.topology, next(model.parameters()).device
    _check(distances, task)
    rows = math.ceil(math.ceil(queries / task.pairs) / topology.data)
    keys = [(system.config.seed, "asked", topology.data_rank * rows + row) for row in range(rows)]
    pairs = [stored_pairs(task, generator("asked pairs", *key)) for key in keys]
    heads = np.stack([document_head(task, *stored) for stored in pairs])
    streams = topology.data_rank * rows + torch.arange(rows)

    def batch(ids: np.ndarray, labels: np.ndarray, start: int) -> TokenBatch:
        positions = torch.arange(start, start + ids.shape[1]).expand(rows, -1)
        tensors = (torch.from_numpy(ids), torch.from_numpy(labels), torch.zeros_like(positions), positions, streams)
        return TokenBatch(*tensors).to(device)

    def text(start: int, stop: int) -> np.ndarray:
        ids = np.stack([fillers(task, start, stop, *key) for key in keys])
        stored = heads[:, start:stop]
        ids[:, : stored.shape[1]] = stored
        return ids

    whole = system.config.sequence_length
    piece = -(-PIECE // whole) * whole
    carries: dict[str, Carry] = {mode: {} for mode in modes}
    found: dict[str, list[Found]] = {mode: [] for mode in modes}
    memory: list[int] = []
    position = 0
    for distance in distances:
        # The first pair's value is token 1 and the last pair's 2 pairs - 1: the distance is the mean pair's.
        target = _divided(distance + task.pairs, topology.sequence)
        while position < target:
            stop = min(position + piece, target)
            ids = text(position, stop)
            part = batch(ids, np.full_like(ids, IGNORED), position)
            for mode, options in modes.items():
                sync_point("evaluation")
                context = StepContext(topology, system.config.seed, "evaluation", 1, options)
                carries[mode] = system.forward(model, part, carries[mode], context).carry
            position = stop
        part = batch(*questions(task, pairs, keys, distance), position)
        for mode, options in modes.items():
            sync_point("evaluation")
            context = StepContext(topology, system.config.seed, "evaluation", 1, {**options, "predict": True})
            tokens = system.forward(model, part, carries[mode], context).tokens
            labels = part.labels[:, topology.shard(part.labels.shape[1])]
            counted = labels != IGNORED
            right = (tokens["predictions"] == labels) & counted
            sums = torch.stack([x.double().sum() for x in (right, counted, tokens["losses"])])
            found[mode].append(Found(*_total(sums).tolist()))
        memory.append(int(_most(torch.tensor(peak_memory(), device=device))))
    return found, memory


def _check(distances: Sequence[int], task: RecallConfig) -> None:
    """Raises UserError where a distance cannot be asked at."""
    least = task.pairs + 2
    if not distances or min(distances) < least:
        raise UserError(
            f"--lengths {' '.join(map(str, distances)) or 'is empty'}: the list of {task.pairs} pairs is"
            f" {2 * task.pairs + 1} tokens long: give {least} or more"
        )
    check_rising(distances)


def check_rising(lengths: Sequence[int]) -> None:
    """Raises UserError where lengths do not rise."""
    if list(lengths) != sorted(set(lengths)):
        raise UserError(f"--lengths {' '.join(map(str, lengths))}: give rising lengths, each once")


def _divided(length: int, degree: int) -> int:
    """The next length that sequence ranks can share."""
    return -(-length // degree) * degree


def questions(
    task: RecallConfig,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    keys: Sequence[tuple[object, ...]],
    distance: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) [rows, PERIOD * pairs]: every pair once, in an order of the document's own, among filler."""
    length = PERIOD * task.pairs
    ids = np.stack([fillers(task, 0, length, "between queries", distance, *key) for key in keys])
    labels = np.full_like(ids, IGNORED)
    places = PERIOD * np.arange(task.pairs)
    for row, (stored, values) in enumerate(pairs):
        order = generator("order", distance, *keys[row]).permutation(task.pairs)
        ids[row, places], ids[row, places + 1] = stored[order], values[order]
        labels[row, places] = values[order]
    return ids, labels


def _total(sums: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums


def _most(value: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def recall_curve(
    found: Mapping[str, Sequence[Found]],
    x: Sequence[int],
    task: RecallConfig,
    *,
    title: str,
    x_label: str,
    edges: Mapping[str, float],
) -> Curve:
    """Share of right answers of every mode with Wilson's intervals over queries, beside chance."""
    ends = {mode: [wilson(f.right, f.queries) for f in points] for mode, points in found.items()}
    first = next(iter(found.values()))
    return Curve(
        title,
        x_label,
        "share of right answers",
        tuple(map(float, x)),
        {mode: tuple(f.share for f in points) for mode, points in found.items()},
        log_x=True,
        intervals={
            mode: (tuple(low for low, _ in pairs), tuple(high for _, high in pairs)) for mode, pairs in ends.items()
        },
        counts=tuple(int(f.queries) for f in first),
        levels={f"chance, 1 in {task.values}": 1 / task.values},
        edges=dict(edges),
    )


def evaluate_long_recall(
    system: Evaluated,
    model: nn.Module,
    sync_point: SyncPoint,
    modes: Modes,
    task: RecallConfig,
    *,
    edges: Mapping[str, float],
    distances: Sequence[int] = DISTANCES,
    queries: int = QUERIES,
) -> Evaluation:
    """Loss and share of right answers in every mode by distance, over all and one by one; memory held. Collective.

    Scalars by distance are `recall/16384`, `memory_off/recall/16384`; `peak_memory/16384` is the most bytes that a rank
    has held so far. `edges`: the curve's vertical lines, in tokens by label.
    """
    found, memory = ask_at_distances(system, model, sync_point, modes, task, distances, queries=queries)
    scalars: dict[str, float] = {}
    for mode, points in found.items():
        prefix, asked = scalar_prefix(modes, mode), sum(f.queries for f in points)
        scalars[f"{prefix}loss"] = sum(f.nats for f in points) / asked
        scalars[f"{prefix}recall"] = sum(f.right for f in points) / asked
        for distance, f in zip(distances, points, strict=True):
            scalars[f"{prefix}recall/{distance}"] = f.share
    scalars |= {f"peak_memory/{d}": float(held) for d, held in zip(distances, memory, strict=True)}
    scalars["queries"] = found[first_mode(modes)][0].queries
    curve = recall_curve(
        found, distances, task, title=f"Recall of {task.pairs} pairs through the carry",
        x_label="tokens from a pair to its query", edges=edges,
    )  # fmt: skip
    return Evaluation(scalars, {"recall_by_distance": curve})


def evaluate_capacity(
    system: Evaluated,
    model: nn.Module,
    sync_point: SyncPoint,
    modes: Modes,
    task: RecallConfig,
    *,
    edges: Mapping[str, float],
    distance: int = 1024,
    queries: int = QUERIES,
) -> Evaluation:
    """Share of right answers at one distance by the number of pairs stored: 1, 2, 4, ... up to all keys. Collective.

    Scalars are `capacity/16` for 16 pairs, and so on. `edges`: the curve's vertical lines, in pairs by label.
    """
    counts = [2**power for power in range(task.keys.bit_length()) if 2**power <= task.keys]
    found: dict[str, list[Found]] = {mode: [] for mode in modes}
    for pairs in counts:
        largest = max(task.max_gap, task.min_gap + 4 * pairs)
        asked = dataclasses.replace(task, pairs=pairs, queries=1, max_gap=largest)
        apart = max(distance, pairs + 2)
        points, _ = ask_at_distances(system, model, sync_point, modes, asked, (apart,), queries=queries)
        for mode in modes:
            found[mode] += points[mode]
    scalars = {
        f"{scalar_prefix(modes, mode)}capacity/{pairs}": f.share
        for mode, points in found.items()
        for pairs, f in zip(counts, points, strict=True)
    }
    curve = recall_curve(
        found, counts, task, title=f"Recall after {distance} tokens, by the pairs stored", x_label="pairs stored",
        edges=edges,
    )  # fmt: skip
    return Evaluation(scalars, {"recall_by_pairs": curve})
