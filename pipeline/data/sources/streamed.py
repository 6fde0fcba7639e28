"""One side of a streamed data set: one reader per rank, whose documents are handed to the rank's streams."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, Protocol

from pipeline.data.sources.base import Document, Order, Permutation, Place, digest, hold_out_threshold
from pipeline.errors import UserError

INTERLEAVED_SHARDS = 8
"""Shards that a shuffled epoch reads in turn, so that a batch does not come from one file."""
BUFFER_BYTES = 256 << 20
"""Text that is kept for streams that are behind; beyond it the furthest documents are read again when they are due."""
_SNAPSHOT_EVERY = 100
_MAX_SNAPSHOTS = 2048


class Stream(Protocol):
    """A data set that is read from front to back."""

    name: str
    shuffle_buffer: int
    data: Any
    """The library's `IterableDataset`."""

    def document(self, row: dict[str, Any], number: int) -> Document: ...

    def broken_off(self, error: Exception) -> UserError: ...


class _Rows:
    """One pass over the rows of a data set, a few shards in turn; its state is JSON and cheap to return to."""

    def __init__(self, source: Stream, order: Order, epoch: int, state: dict[str, Any] | None) -> None:
        self._source, self._data = source, source.data
        count = self._data.num_shards
        self._shards = Permutation(count, "shards", order.seed, epoch) if order.shuffle else int
        self._width = INTERLEAVED_SHARDS if order.shuffle else 1
        state = state or {"next": 0, "turn": 0, "open": []}
        self._next, self._turn = state["next"], state["turn"]
        self._given = 0
        self._open = [self._resume(shard, inner) for shard, inner in state["open"]]

    def _resume(self, shard: int, state: dict[str, Any] | None) -> tuple[int, Any, Iterator[dict[str, Any]]]:
        data = self._data.shard(num_shards=self._data.num_shards, index=shard)
        if state is not None:
            data.load_state_dict(state)
        return shard, data, iter(data)

    def state(self) -> dict[str, Any]:
        opened = [[shard, data.state_dict()] for shard, data, _ in self._open]
        return {"next": self._next, "turn": self._turn, "open": opened}

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        while self._next < self._data.num_shards and len(self._open) < self._width:
            self._open.append(self._resume(self._shards(self._next), None))
            self._next += 1
        while self._open:
            self._turn %= len(self._open)
            try:
                row = next(self._open[self._turn][2])
            except StopIteration:
                if self._next < self._data.num_shards:
                    self._open[self._turn] = self._resume(self._shards(self._next), None)
                    self._next += 1
                else:
                    del self._open[self._turn]
                continue
            except Exception as error:
                raise self._source.broken_off(error) from error
            self._turn += 1
            self._given += 1
            return self._source.document(row, self._given)
        raise StopIteration


class StreamedDocuments:
    """One side of the hold-out of a streamed data set.

    All streams of the rank share one reader. It runs ahead to the document that is asked for and keeps what it passes
    for the streams that are behind. `position` counts the documents of this side. With shuffling, `shuffle_buffer`
    documents at a time are permuted: a block is a function of (seed, epoch, position), so its start can be returned to.
    """

    def __init__(self, source: Stream, order: Order, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._source, self._order, self._limit = source, order, buffer_bytes
        self._threshold = hold_out_threshold(order.holdout)
        # Held-out documents are rare: to fill a block would take some fifty times its rows before the first is read.
        self._block = source.shuffle_buffer if order.shuffle and not order.held_out else 1
        self._buffer: dict[tuple[int, int], Document] = {}
        self._buffered = 0
        # The first place each stream may still ask for.
        self._needed = dict.fromkeys(order.local_streams, (0, 0))
        # The place each stream is at: a resume asks for it again.
        self._current = dict.fromkeys(order.local_streams, (0, 0))
        self._snapshots: list[tuple[int, int, dict[str, Any]]] = []
        self._length: int | None = None
        self._place = (0, 0)
        self._rows = _Rows(source, order, 0, None)

    def read(self, epoch: int, position: int) -> Document | None:
        key, stream = (epoch, position), self._order.stream(epoch, position)
        self._needed[stream] = self._current[stream] = key
        if self._length is not None and position >= self._length:
            return None
        if key not in self._buffer:
            if self._place > key:
                self._return_to(epoch, position)
            while self._place <= key:
                self._advance()
            if key not in self._buffer:  # the epoch ended before it
                return None
        # Held-out documents stay, so that the next evaluation does not read the data set again.
        document = self._buffer[key] if self._order.held_out else self._drop(key)
        self._needed[stream] = (epoch, position + 1)
        return document

    def count(self) -> int | None:
        return self._length

    def scan(self) -> Iterator[Document]:
        return filter(self._in_split, _Rows(self._source, self._order, 0, None))

    def hint(self, epoch: int, position: int) -> dict[str, Any] | None:
        found = self._snapshot(epoch, position)
        return None if found is None else {"epoch": found[0], "position": found[1], "state": found[2]}

    def seek(self, places: dict[int, Place]) -> None:
        self._needed = {stream: (place.epoch, place.position) for stream, place in places.items()}
        self._current = dict(self._needed)
        hints = (place.hint for place in places.values())
        merged = {(hint["epoch"], hint["position"]): hint["state"] for hint in hints if hint is not None}
        known = {(epoch, position): state for epoch, position, state in self._snapshots}
        self._snapshots = [(*key, state) for key, state in sorted((known | merged).items())]
        if not self._order.held_out:
            self._buffer, self._buffered = {}, 0
        first = min(self._needed.values())
        if not self._order.held_out or first > self._place:
            self._return_to(*first)

    def _in_split(self, document: Document) -> bool:
        # A record that has a problem has no text to be held out by.
        held_out = document.problem is None and digest(document.text) < self._threshold
        return held_out == self._order.held_out

    def _snapshot(self, epoch: int, position: int) -> tuple[int, int, dict[str, Any]] | None:
        index = bisect_right(self._snapshots, (epoch, position), key=lambda snapshot: snapshot[:2])
        found = self._snapshots[index - 1] if index else None
        return found if found is not None and found[0] == epoch else None

    def _return_to(self, epoch: int, position: int) -> None:
        found = self._snapshot(epoch, position)
        if found is not None:
            self._place = found[:2]
            self._rows = _Rows(self._source, self._order, epoch, found[2])
        else:
            self._place = (epoch, 0)
            self._rows = _Rows(self._source, self._order, epoch, None)

    def _advance(self) -> None:
        """Reads one block, or ends the epoch."""
        epoch, start = self._place
        self._take_snapshot()
        block = []
        for document in filter(self._in_split, self._rows):
            block.append(document)
            if len(block) == self._block:
                break
        if not block:
            self._end_epoch(epoch, start)
            return
        permute = Permutation(len(block), "block", self._order.seed, epoch, start)
        for index in range(len(block)):
            position = start + index
            if (epoch, position) >= self._needed.get(self._order.stream(epoch, position), (epoch + 1, 0)):
                self._keep((epoch, position), block[permute(index)])
        self._place = (epoch, start + len(block))
        if self._buffered > self._limit:
            self._evict()

    def _end_epoch(self, epoch: int, length: int) -> None:
        if length == 0:
            side = "held-out" if self._order.held_out else "training"
            change = "raise" if self._order.held_out else "lower"
            raise UserError(f"--data.dataset {self._source.name} has no {side} document: {change} --data.holdout")
        self._length = length
        self._place = (epoch + 1, 0)
        self._rows = _Rows(self._source, self._order, epoch + 1, None)

    def _take_snapshot(self) -> None:
        epoch, position = self._place
        last = self._snapshots[-1] if self._snapshots else (0, -_SNAPSHOT_EVERY, {})
        if position == 0 or (epoch, position - _SNAPSHOT_EVERY) < last[:2]:
            return
        self._snapshots.append((epoch, position, self._rows.state()))
        # No stream goes back behind the slowest one.
        slowest = bisect_right(self._snapshots, min(self._current.values()), key=lambda snapshot: snapshot[:2])
        if not self._order.held_out:
            del self._snapshots[: max(slowest - 1, 0)]
        if len(self._snapshots) > _MAX_SNAPSHOTS:
            del self._snapshots[1:-1:2]

    def _keep(self, key: tuple[int, int], document: Document) -> None:
        if key in self._buffer:
            return
        self._buffer[key] = document
        self._buffered += len(document.text)

    def _evict(self) -> None:
        """Gives up, from the longest queues, what will be asked for last; it is read again when it is due."""
        depths: dict[int, int] = {}
        ranked = []
        for key in sorted(self._buffer):
            stream = self._order.stream(*key)
            depths[stream] = depths.get(stream, 0) + 1
            ranked.append((depths[stream], key))
        for depth, key in sorted(ranked, reverse=True):
            if depth == 1 or self._buffered <= self._limit // 2:
                break
            self._drop(key)

    def _drop(self, key: tuple[int, int]) -> Document:
        document = self._buffer.pop(key)
        self._buffered -= len(document.text)
        return document
