"""Key-value recall over distances on a log scale: documents that go on over several sequences, through the carry."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.data.generated import GeneratedDocuments
from pipeline.data.sources.base import digest
from pipeline.data_config import RecallConfig

FILLER_BLOCK = 4096
"""Filler tokens that are drawn at once."""


def generator(*key: object) -> np.random.Generator:
    """A function of `key` alone, on every machine."""
    return np.random.Generator(np.random.Philox(key=[digest("recall", 0, *key), digest("recall", 1, *key)]))


def stored_pairs(task: RecallConfig, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(different keys, values), each [pairs] int64."""
    keys = 1 + draw.choice(task.keys, task.pairs, replace=False)
    return keys, 1 + task.keys + draw.integers(task.values, size=task.pairs)


def document_head(task: RecallConfig, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The pairs and the separator, [2 pairs + 1] int64."""
    head = np.zeros(2 * task.pairs + 1, np.int64)
    head[:-1:2], head[1:-1:2] = keys, values
    return head


def fillers(task: RecallConfig, start: int, stop: int, *key: object) -> np.ndarray:
    """Filler tokens at positions start to stop of the document `key`, [stop - start] int64.

    They do not depend on how a document is cut, and none before `start` need be kept.
    """
    first = 1 + task.keys + task.values
    blocks = [
        first + generator("filler", index, *key).integers(task.fillers, size=FILLER_BLOCK)
        for index in range(start // FILLER_BLOCK, -(-stop // FILLER_BLOCK))
    ]
    offset = start // FILLER_BLOCK * FILLER_BLOCK
    return np.concatenate([*blocks, np.empty(0, np.int64)])[start - offset : stop - offset]


def long_recall_document(task: RecallConfig, sequence_length: int, *key: object) -> tuple[np.ndarray, np.ndarray]:
    """(input ids, labels) of a document, int64: a whole number of sequences, as few as hold its last answer.

    Its largest distance is drawn on a log scale, from the least with room for the queries to `max_gap`, then the places
    of the queries within it, with a density of 1 / distance. A function of the task, the length and `key` alone.
    """
    draw = generator("long", *key)
    largest = round(math.exp(draw.uniform(math.log(task.least_gap), math.log(task.max_gap))))
    room = dataclasses.replace(task, max_gap=largest)
    slots = np.array(room.query_slots(int(draw.integers(2))))  # the shift makes gaps of both parities
    if len(slots) < task.queries:
        slots = np.array(room.query_slots(0))
    keys, values = stored_pairs(task, draw)
    near = 1 / (slots - 2 * task.pairs + 1.0)
    places = draw.choice(slots, task.queries, replace=False, p=near / near.sum())
    asked = draw.choice(task.pairs, task.queries, replace=False)
    length = -(-(int(places.max()) + 2) // sequence_length) * sequence_length
    head = document_head(task, keys, values)
    length = max(length, -(-len(head) // sequence_length) * sequence_length)
    ids = fillers(task, 0, length, *key)
    ids[: len(head)] = head
    ids[places], ids[places + 1] = keys[asked], values[asked]
    labels = np.full(length, IGNORED)
    labels[places] = values[asked]
    return ids, labels


class LongRecallLoader(GeneratedDocuments):
    """Documents of `long_recall_document`, one after the other in each stream, with the contract of `StatefulLoader`.

    What a stream reads depends on (seed, split, stream) alone. A document keeps its segment id from step to step.
    """

    def __init__(self, config: RecallConfig, **layout: Any) -> None:
        super().__init__("recall", asdict(config), **layout)
        self.config = config

    def next_step(self) -> list[TokenBatch]:
        """The micro-batches of one optimizer step, on the CPU."""
        rows = [self._next_row(stream) for stream in self.local_streams]
        return [TokenBatch(*parts) for parts in self._micro_batches(rows)]

    def _next_row(self, stream: int) -> tuple[np.ndarray, ...]:
        """Ids, labels, segment ids and positions of the stream's next sequence; moves the stream on."""
        document, start = self._places[stream]
        if stream not in self._documents:
            self._documents[stream] = long_recall_document(
                self.config, self.sequence_length, *self._key, stream, document
            )
        ids, labels = self._documents[stream]
        stop = start + self.sequence_length
        positions = np.arange(start, stop)
        self._places[stream] = (document, stop)
        if stop == len(ids):
            self._places[stream] = (document + 1, 0)
            del self._documents[stream]
        return ids[start:stop], labels[start:stop], np.full_like(positions, document), positions

    def describe(self) -> str:
        """One line for logs."""
        task = self.config
        return (
            f"synthetic recall: {task.pairs} pairs, gaps of {task.min_gap} to {task.max_gap} tokens on a log scale,"
            f" over sequences of {self.sequence_length}"
        )
