"""Hugging Face data sets in streaming mode: one reader per rank, whose documents are handed to the rank's streams."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.data.sources.base import Document, Documents, Order, Permutation, Place, digest, hold_out_threshold
from pipeline.data.sources.content import hash_files
from pipeline.data.sources.readers import well_formed
from pipeline.errors import UserError

INTERLEAVED_SHARDS = 8
"""Shards that a shuffled epoch reads in turn, so that a batch does not come from one file."""
BUFFER_BYTES = 256 << 20
"""Text that is kept for streams that are behind; beyond it the furthest documents are read again when they are due."""
_COMMIT = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")
_SNAPSHOT_EVERY = 100
_MAX_SNAPSHOTS = 2048


class HuggingFaceStream:
    """A data set of the Hub (`NAME` or `NAME@REVISION`) or a local folder, read as it is needed."""

    def __init__(
        self,
        dataset: str,
        *,
        config_name: str | None = None,
        split: str = "train",
        text_field: str = "text",
        data_files: str | list[str] | None = None,
        shuffle_buffer: int = 1000,
    ) -> None:
        self.name, self.split, self.text_field, self.shuffle_buffer = dataset, split, text_field, shuffle_buffer
        folder = Path(dataset).expanduser()
        self._local = folder.exists()
        self._path, _, revision = (str(folder), "", "") if self._local else dataset.partition("@")
        self._config_name = config_name
        self._builder, self.data = self._load(data_files, revision or None)

    def _load(self, data_files: str | list[str] | None, revision: str | None) -> tuple[Any, Any]:
        import datasets

        try:
            builder = datasets.load_dataset_builder(
                self._path, self._config_name, data_files=data_files, revision=revision
            )
            data = builder.as_streaming_dataset(split=self.split)
            columns = data.column_names
            if columns and self.text_field in columns:
                data = data.select_columns([self.text_field])
        except Exception as error:  # the library raises many kinds for a wrong name, subset or split and a dead network
            raise UserError(
                f"--data.dataset {self.name} (split {self.split!r}) cannot be read: {_reason(error)}; check the name,"
                " --data.dataset-config, --data.split and the network, or give local documents with --data.path"
            ) from error
        if columns and self.text_field not in columns:
            raise self._no_text(f"has no column {self.text_field!r} (it has {', '.join(map(repr, columns))})")
        return builder, data

    def open(self, order: Order) -> Documents:
        return StreamedDocuments(self, order)

    def fingerprint(self) -> dict[str, Any]:
        """Name, settings that decide the order, and files: by content where they are local, by commit on the Hub.

        The commit stands by itself: it is the @REVISION that gives a moved data set back.
        """
        return {
            **({"revision": self._commit} if self._commit else {}),
            "dataset": Path(self._path).name if self._local else self._path,
            "config": self._config_name,
            "split": self.split,
            "text_field": self.text_field,
            "shuffle_buffer": self.shuffle_buffer,
            "interleaved": INTERLEAVED_SHARDS,
            "shards": self.data.num_shards,
            "files": self._files,
        }

    @property
    def _groups(self) -> list[Any]:
        """The data files of the split, as the library resolved them; of all splits where it does not tell."""
        listed = self._builder.config.data_files or {}
        return [listed[self.split]] if self.split in listed else list(listed.values())

    @cached_property
    def _commit(self) -> str:
        """The commits of the Hub that the files are read at; they stay the same for as long as this run lasts."""
        files = (str(file) for group in self._groups for file in group)
        return ", ".join(sorted({found[1] for file in files if (found := _COMMIT.match(file))}))

    @cached_property
    def _files(self) -> str:
        groups = self._groups
        files = [str(file) for group in groups for file in group]
        if files and all(Path(file).is_file() for file in files):
            try:
                return hash_files([(Path(file).name, Path(file)) for file in files])
            except OSError as error:
                raise UserError(f"--data.dataset {self.name} cannot be read: {_reason(error)}") from error
        origins = [str(origin) for group in groups for origin in group.origin_metadata]
        return f"{digest(self._builder.hash, *files, *origins):016x}"

    def describe(self) -> str:
        return f"{self.name}, split {self.split!r}, streamed: {self.data.num_shards:,} shards"

    def text(self, row: dict[str, Any]) -> str:
        """The text of a row."""
        if self.text_field not in row:
            raise self._no_text(f"has a row without {self.text_field!r} (it has {', '.join(map(repr, row))})")
        text = row[self.text_field]
        if text is not None and not isinstance(text, str):
            raise self._no_text(f"holds {type(text).__name__} values in {self.text_field!r}, not text")
        return well_formed(text or "")

    def _no_text(self, what: str) -> UserError:
        return UserError(f"--data.dataset {self.name} {what}: name the text with --data.text-field")


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".:") if str(error).strip() else type(error).__name__


class _Rows:
    """One pass over the rows of a data set, a few shards in turn; its state is JSON and cheap to return to."""

    def __init__(self, source: HuggingFaceStream, order: Order, epoch: int, state: dict[str, Any] | None) -> None:
        self._source, self._data = source, source.data
        count = self._data.num_shards
        self._shards = Permutation(count, "shards", order.seed, epoch) if order.shuffle else int
        self._width = INTERLEAVED_SHARDS if order.shuffle else 1
        state = state or {"next": 0, "turn": 0, "open": []}
        self._next, self._turn = state["next"], state["turn"]
        self._open = [self._resume(shard, inner) for shard, inner in state["open"]]

    def _resume(self, shard: int, state: dict[str, Any] | None) -> tuple[int, Any, Iterator[dict[str, Any]]]:
        data = self._data.shard(num_shards=self._data.num_shards, index=shard)
        if state is not None:
            data.load_state_dict(state)
        return shard, data, iter(data)

    def state(self) -> dict[str, Any]:
        opened = [[shard, data.state_dict()] for shard, data, _ in self._open]
        return {"next": self._next, "turn": self._turn, "open": opened}

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
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
                raise UserError(
                    f"--data.dataset {self._source.name} broke off ({_reason(error)}): resume the run when it can be"
                    " read again"
                ) from error
            self._turn += 1
            return self._source.text(row)
        raise StopIteration


class StreamedDocuments:
    """One side of the hold-out of a streamed data set.

    All streams of the rank share one reader. It runs ahead to the document that is asked for and keeps what it passes
    for the streams that are behind. `position` counts the documents of this side. With shuffling, `shuffle_buffer`
    documents at a time are permuted: a block is a function of (seed, epoch, position), so its start can be returned to.
    """

    def __init__(self, source: HuggingFaceStream, order: Order, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._source, self._order, self._limit = source, order, buffer_bytes
        self._threshold = hold_out_threshold(order.holdout)
        # Held-out documents are rare: to fill a block would take some fifty times its rows before the first is read.
        self._block = source.shuffle_buffer if order.shuffle and not order.held_out else 1
        self._buffer: dict[tuple[int, int], Document] = {}
        self._buffered = 0
        self._needed = dict.fromkeys(order.mine, (0, 0))  # the first place each stream may still ask for
        self._current = dict.fromkeys(order.mine, (0, 0))  # the place each stream is at: a resume asks for it again
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
        texts = filter(self._mine, _Rows(self._source, self._order, 0, None))
        return (Document(f"{self._source.name} (document {number})", text) for number, text in enumerate(texts))

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

    def _mine(self, text: str) -> bool:
        return (digest(text) < self._threshold) == self._order.held_out

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
        for text in filter(self._mine, self._rows):
            block.append(text)
            if len(block) == self._block:
                break
        if not block:
            self._end_epoch(epoch, start)
            return
        permute = Permutation(len(block), "block", self._order.seed, epoch, start)
        for index in range(len(block)):
            position = start + index
            if (epoch, position) >= self._needed.get(self._order.stream(epoch, position), (epoch + 1, 0)):
                name = f"{self._source.name} (document {position}, epoch {epoch})"
                self._keep((epoch, position), Document(name, block[permute(index)]))
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
