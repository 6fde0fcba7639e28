"""Key-value recall: sequences whose answers lie a known number of tokens back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.data.generated import GeneratedStreams
from pipeline.data.resume import check_fingerprint
from pipeline.data.sources.base import digest
from pipeline.data_config import RecallConfig
from pipeline.errors import UserError


def recall_example(task: RecallConfig, length: int, *key: object) -> tuple[np.ndarray, np.ndarray]:
    """(input ids, labels), each [length] int64: a function of the task and `key` alone."""
    draw = np.random.Generator(np.random.Philox(key=[digest("recall", 0, *key), digest("recall", 1, *key)]))
    keys = 1 + draw.choice(task.keys, task.pairs, replace=False)
    values = 1 + task.keys + draw.integers(task.values, size=task.pairs)
    ids = 1 + task.keys + task.values + draw.integers(task.fillers, size=length)
    ids[: 2 * task.pairs : 2], ids[1 : 2 * task.pairs : 2] = keys, values
    ids[2 * task.pairs] = 0
    asked = draw.choice(task.pairs, task.queries, replace=False)
    slots = task.query_slots(int(draw.integers(2)))  # the shift makes gaps of both parities
    if len(slots) < task.queries:
        slots = task.query_slots(0)
    places = draw.choice(np.array(slots), task.queries, replace=False)
    ids[places], ids[places + 1] = keys[asked], values[asked]
    labels = np.full(length, IGNORED)
    labels[places] = values[asked]
    return ids, labels


def recall_gaps(input_ids: Tensor, labels: Tensor) -> Tensor:
    """Distance from a query to the value that answers it, [rows, T] int64; -1 where there is no query.

    It takes whole sequences, and reads the gap off the first place where the query's key stands.
    """
    gaps = torch.full_like(input_ids, -1)
    rows, queries = (labels != IGNORED).nonzero(as_tuple=True)
    keys = input_ids[rows, queries]
    first = (input_ids[rows] == keys[:, None]).long().argmax(1)
    gaps[rows, queries] = queries - (first + 1)
    return gaps


def _settings(task: RecallConfig) -> dict[str, Any]:
    """What decides the rows; without `spread`, as in runs older than it, which this loader knows one value of."""
    return {name: value for name, value in asdict(task).items() if name != "spread"}


class RecallLoader(GeneratedStreams):
    """Recall sequences with the contract of `StatefulLoader`: row i of step n depends on (seed, split, i, n) alone."""

    def __init__(self, config: RecallConfig, **layout: Any) -> None:
        if layout["sequence_length"] < config.least_length:
            raise UserError(
                f"--sequence-length {layout['sequence_length']} is too short for recall over max_gap {config.max_gap}:"
                f" give {config.least_length} or more, or lower max_gap"
            )
        super().__init__("recall", _settings(config), **layout)
        self.config = config
        self._step = 0

    def next_step(self) -> list[TokenBatch]:
        """The micro-batches of one optimizer step, on the CPU; the step's number is the segment id."""
        here, positions = np.full(self.sequence_length, self._step), np.arange(self.sequence_length)
        rows = [
            (*recall_example(self.config, self.sequence_length, *self._key, i, self._step), here, positions)
            for i in self.local_streams
        ]
        self._step += 1
        return [TokenBatch(*parts) for parts in self._micro_batches(rows)]

    def state_dict(self) -> dict[str, Any]:
        return {"streams": {str(i): {"step": self._step} for i in self.local_streams}, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_fingerprint(state["fingerprint"], self.fingerprint)
        self._step = int(state["streams"][str(self.local_streams[0])]["step"])

    def describe(self) -> str:
        """One line for logs."""
        task = self.config
        return f"synthetic recall: {task.pairs} pairs, gaps of {task.min_gap} to {task.max_gap} tokens"

    def reset(self) -> None:
        """Back to the first step, as an evaluation does before it starts."""
        self._step = 0
