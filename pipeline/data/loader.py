"""The training loader: packed streams of whole documents, one optimizer step at a time, with an exact position."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from pipeline.data.packing import DocumentEncoder, StreamPacker
from pipeline.data.sources.base import Order, Place, Source
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import UserError
from pipeline.system import Batch

_Cursors = dict[str, dict[str, Any]]

_FLAGS = {
    "source": "--data.path or --data.dataset",
    "tokenizer": "--data.tokenizer",
    "seed": "--seed",
    "shuffle": "--data.shuffle",
    "holdout": "--data.holdout",
    "min_tokens": "--data.min-tokens",
}


def stream_layout(batch_size: int, grad_accum: int, data_rank: int, data_degree: int) -> tuple[int, range]:
    """(streams of the run, those of this data rank); micro-batch j of the rank is the j-th `batch_size` of them."""
    rows = batch_size * grad_accum
    return rows * data_degree, range(data_rank * rows, (data_rank + 1) * rows)


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError naming the first setting that would make a resumed run read other data."""
    if saved.get("streams") != current["streams"]:
        raise UserError(
            f"a resume keeps the global batch: the checkpoint has {saved.get('streams')} streams, this run"
            f" {current['streams']} (--batch-size x data degree x --grad-accum)"
        )
    for key, value in current.items():
        old = saved.get(key)
        if old != value:
            raise UserError(
                f"{_FLAGS.get(key, key)} does not give the data of the checkpoint ({_difference(old, value)}): restore"
                " it, or start a new run with --init-from"
            )


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        return ", ".join(f"{key} {_difference(old.get(key), new[key])}" for key in new if old.get(key) != new[key])
    return f"{old}, now {new}"


class PackedLoader:
    """Row i of every step is stream i of the run; its documents and position depend on i alone, not on the split.

    With `prefetch` a thread prepares the next step while the current one is trained on. The state is that of the steps
    handed out, whatever the thread has read since.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        batch_size: int,
        vocab_size: int,
        grad_accum: int = 1,
        data_rank: int = 0,
        data_degree: int = 1,
        seed: int = 0,
        held_out: bool = False,
        holdout: float = 0.02,
        shuffle: bool = True,
        min_tokens: int = 0,
        prefetch: bool = False,
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.sequence_length, self.batch_size, self.grad_accum = sequence_length, batch_size, grad_accum
        self.held_out, self.min_tokens = held_out, min_tokens
        self.streams, self.mine = stream_layout(batch_size, grad_accum, data_rank, data_degree)
        order = Order(self.streams, self.mine, held_out=held_out, holdout=holdout, shuffle=shuffle, seed=seed)
        self._settings = {
            "seed": seed,
            "shuffle": shuffle,
            "holdout": holdout,
            "min_tokens": min_tokens,
            "held_out": held_out,
        }
        self._documents = source.open(order)
        self._encode = DocumentEncoder(tokenizer, min_tokens=min_tokens, vocab_size=vocab_size)
        self._packers = {
            stream: StreamPacker(stream, self._documents, order, self._encode, self._require_a_document)
            for stream in self.mine
        }
        self._fingerprint: dict[str, Any] | None = None
        self._some_document = False
        self._start = self._cursors = self._read_cursors()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") if prefetch else None
        self._pending: Future[tuple[list[Batch], _Cursors]] | None = None

    def next_step(self) -> list[Batch]:
        """The micro-batches of one optimizer step, on the CPU."""
        if self._thread is None:
            batches, self._cursors = self._prepare()
            return batches
        pending, self._pending = self._pending or self._thread.submit(self._prepare), None
        batches, self._cursors = pending.result()
        self._pending = self._thread.submit(self._prepare)
        return batches

    def _prepare(self) -> tuple[list[Batch], _Cursors]:
        shape = (len(self.mine), self.sequence_length)
        arrays = [np.empty(shape, np.int64) for _ in range(4)]
        for row, packer in enumerate(self._packers.values()):
            packer.fill(*(array[row] for array in arrays))
        tensors = [*map(torch.from_numpy, arrays), torch.tensor(self.mine)]
        batches = [Batch(*parts) for parts in zip(*(tensor.split(self.batch_size) for tensor in tensors), strict=True)]
        return batches, self._read_cursors()

    def _read_cursors(self) -> _Cursors:
        return {str(stream): packer.state_dict() for stream, packer in self._packers.items()}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must agree on; the first call reads the corpus to hash it."""
        if self._fingerprint is None:
            content = {"source": self.source.fingerprint(), "tokenizer": self.tokenizer.fingerprint}
            self._fingerprint = {"streams": self.streams, **content, **self._settings}
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        return {"streams": self._cursors, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_fingerprint(state["fingerprint"], self.fingerprint)
        self._load_cursors(state["streams"])

    def reset(self) -> None:
        """Back to the first document, as an evaluation does before it starts."""
        self._load_cursors(self._start)

    def describe(self) -> str:
        """One line for logs."""
        side, count = "held-out" if self.held_out else "training", self._documents.count()
        documents = f"; {count:,} {side} documents" if count is not None else f" ({side} documents)"
        tokenizer = f"tokenizer {self.tokenizer.name} ({self.tokenizer.vocab_size:,} ids)"
        return f"{self.source.describe()}{documents}; {tokenizer}"

    def _load_cursors(self, cursors: _Cursors) -> None:
        if self._pending is not None:
            self._pending.exception()  # waits; that step is thrown away, and its error with it
            self._pending = None
        places = {}
        for stream, packer in self._packers.items():
            cursor = cursors.get(str(stream))
            if cursor is None:
                raise UserError(f"the checkpoint holds no data position for stream {stream}: resume from another one")
            packer.load_state_dict(cursor)
            places[stream] = Place(cursor["epoch"], cursor["position"], cursor.get("reader"))
        self._documents.seek(places)
        self._cursors = self._read_cursors()

    def _require_a_document(self) -> None:
        """Called when a stream has found nothing in an epoch: raises UserError unless there is something to find."""
        if self._some_document or any(self._encode(document) is not None for document in self._documents.scan()):
            self._some_document = True
            return
        side = "held-out" if self.held_out else "training"
        if self.min_tokens:
            raise UserError(
                f"no {side} document of {self.source.name} has --data.min-tokens {self.min_tokens} tokens: lower it, or"
                " give longer documents"
            )
        raise UserError(f"every {side} document of {self.source.name} is empty: give documents with text")
