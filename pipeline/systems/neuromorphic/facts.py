"""Key-value facts: told at the start of a document, asked for once, further on in it or in a later document.

A document is `K V K V ... F F F K V F F ... E`: the facts that it tells, then fillers with questions among them, then
the end of the document. A question is the key again, and its answer the value, which follows. Fillers go round in a
fixed order, so that what a model cannot predict is what it is told. Every fact is told once and asked for once: what
lies between is the distance. No key is told again before the last question about it may have come.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.data.generated import GeneratedDocuments
from pipeline.data.long_recall import generator
from pipeline.systems.neuromorphic.facts_config import FactsConfig

EOS = 0
NONE = -1
"""Distance of a token that asks for nothing."""


@dataclass(frozen=True)
class Told:
    """The facts of a document in the order in which they are told."""

    keys: np.ndarray
    """[facts] token ids."""
    values: np.ndarray
    """[facts] token ids."""
    lags: np.ndarray
    """[facts]: how many documents later each is asked for; 0: in the same."""
    length: int
    """Tokens of the document."""
    domain: int


def told(task: FactsConfig, document: int, *key: object) -> Told:
    """What a document of the stream `key` tells: a function of task, document and `key` alone."""
    turn, place = divmod(document, task.turn)
    half = task.keys // 2
    chosen = generator("keys", turn, *key).choice(half, task.facts * task.turn, replace=False)
    keys = 1 + half * (turn % 2) + chosen[place * task.facts : (place + 1) * task.facts]
    draw = generator("facts", document, *key)
    lags = np.zeros(task.facts, np.int64)
    lags[task.within :] = draw.integers(1, task.documents + 1, task.later) if task.later else 0
    if task.fewest is not None:
        count = int(draw.integers(task.fewest, task.facts + 1))
        keys, lags = keys[:count], lags[:count]
    return Told(
        keys,
        task.first_value + draw.integers(task.values, size=len(keys)),
        draw.permutation(lags),
        int(draw.integers(task.least_tokens, task.most_tokens + 1)),
        int(draw.integers(task.domains)),
    )


@dataclass(frozen=True)
class Question:
    """A fact that is asked for, and how far back it was told: `distance` from its value to its key's second coming,
    less the place of that in the document."""

    key: int
    value: int
    documents: int
    distance: int


@dataclass(frozen=True)
class FactsDocument:
    """A document's tokens, each array [tokens] int64."""

    ids: np.ndarray
    labels: np.ndarray
    tokens: np.ndarray
    """How many tokens back what is asked for was told; `NONE` where nothing is."""
    documents: np.ndarray
    """How many documents back; `NONE` where nothing is asked for."""


def facts_document(task: FactsConfig, document: int, *key: object) -> FactsDocument:
    """Document number `document` of the stream `key`: a function of task, document and `key` alone."""
    here = told(task, document, *key)
    own = [Question(int(here.keys[i]), int(here.values[i]), 0, -2 * i - 1) for i in np.flatnonzero(here.lags == 0)]
    earlier, begun = [], 0
    for lag in range(1, min(task.documents, document) + 1):
        there = told(task, document - lag, *key)
        begun += there.length
        earlier += [
            Question(int(there.keys[i]), int(there.values[i]), lag, begun - 2 * i - 1)
            for i in np.flatnonzero(there.lags == lag)
        ]
    return written(task, here, own, earlier, generator("places", document, *key))


def written(
    task: FactsConfig, here: Told, own: list[Question], earlier: list[Question], draw: np.random.Generator
) -> FactsDocument:
    """A document that tells `here` and asks for facts of its own, and for others."""
    head, length = 2 * len(here.keys), here.length
    ids = np.empty(length, np.int64)
    slots = np.arange(head + 1 + int(draw.integers(2)), length - 2, 2)
    far = slots[slots >= head - 1 + task.least_distance]
    chosen = draw.choice(far, len(own), replace=False)
    chosen = np.concatenate([chosen, draw.choice(np.setdiff1d(slots, chosen), len(earlier), replace=False)])
    is_filler = np.ones(length, bool)
    is_filler[:head], is_filler[-1] = False, False
    is_filler[chosen], is_filler[chosen + 1] = False, False
    first = task.first_filler + here.domain * task.fillers
    ids[is_filler] = first + (int(draw.integers(task.fillers)) + np.arange(is_filler.sum())) % task.fillers
    ids[:head:2], ids[1:head:2], ids[-1] = here.keys, here.values, EOS
    tokens, documents = np.full(length, NONE), np.full(length, NONE)
    for place, question in zip(chosen.tolist(), own + earlier, strict=True):
        ids[place], ids[place + 1] = question.key, question.value
        tokens[place], documents[place] = question.distance + place, question.documents
    labels = np.append(ids[1:], IGNORED)
    if task.labels == "facts":
        labels[is_filler] = IGNORED
    return FactsDocument(ids, labels, tokens, documents)


@dataclass(frozen=True)
class FactsBatch(TokenBatch):
    """Text of facts, and at every token how far back lies what its label was told; `NONE` where nothing is asked."""

    tokens: Tensor
    """[rows, T] int64."""
    documents: Tensor
    """[rows, T] int64: 0 in the same document."""

    def to(self, device: torch.device) -> FactsBatch:
        return FactsBatch(
            *(getattr(self, name).to(device, non_blocking=True) for name in FactsBatch.__dataclass_fields__)
        )


class FactsLoader(GeneratedDocuments):
    """Documents of `facts_document`, one after the other in each stream, with the contract of `StatefulLoader`.

    What a stream reads depends on (seed, split, stream) alone. A document goes on in the next step, under the same
    segment id.
    """

    def __init__(self, config: FactsConfig, **layout: Any) -> None:
        super().__init__("facts", asdict(config), **layout)
        self.config = config

    def next_step(self) -> list[TokenBatch]:
        """The micro-batches of one optimizer step, on the CPU, each a `FactsBatch`."""
        rows = [self._next_row(stream) for stream in self.local_streams]
        return [FactsBatch(*parts) for parts in self._micro_batches(rows)]

    def _next_row(self, stream: int) -> tuple[np.ndarray, ...]:
        """Ids, labels, segment ids, positions and both distances of the stream's next sequence; moves it on."""
        document, offset = self._places[stream]
        parts: list[tuple[np.ndarray, ...]] = []
        missing = self.sequence_length
        while missing:
            number, found = self._documents.get(stream, (None, None))
            if number != document or found is None:
                found = facts_document(self.config, document, *self._key, stream)
                self._documents[stream] = (document, found)
            place = slice(offset, min(offset + missing, len(found.ids)))
            positions = np.arange(place.start, place.stop)
            arrays = (found.ids, found.labels, np.full(len(found.ids), document))
            parts.append((*(array[place] for array in arrays), positions, found.tokens[place], found.documents[place]))
            missing -= len(positions)
            document, offset = (document + 1, 0) if place.stop == len(found.ids) else (document, place.stop)
        self._places[stream] = (document, offset)
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def describe(self) -> str:
        """One line for logs."""
        task = self.config
        later = f", {task.later} up to {task.documents} documents later" if task.later else ""
        return (
            f"synthetic facts: {task.facts} a document of {task.least_tokens} to {task.most_tokens} tokens,"
            f" {task.within} asked for {task.least_distance} tokens on or more{later}"
        )
