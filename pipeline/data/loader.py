"""The training loader: packed streams of whole documents, one optimizer step at a time, with an exact position."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from pipeline.data.batch import TokenBatch
from pipeline.data.packing import DocumentEncoder, StreamPacker
from pipeline.data.records import RecordLog
from pipeline.data.resume import accepted, check_reading_settings, reads_the_same, refuse_source
from pipeline.data.sources.base import Order, Place, Source
from pipeline.data.sources.mixed import MixedDocuments, corpora
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import UserError

_Cursors = Mapping[str, dict[str, Any]]

logger = logging.getLogger(__name__)


def stream_layout(batch_size: int, grad_accum: int, data_rank: int, data_degree: int) -> tuple[int, range]:
    """(streams of the run, those of this data rank); micro-batch j of the rank is the j-th `batch_size` of them."""
    rows = batch_size * grad_accum
    return rows * data_degree, range(data_rank * rows, (data_rank + 1) * rows)


class PackedLoader:
    """Row i of every step is stream i of the run; its documents and position depend on i alone, not on the split.

    With `prefetch` a thread prepares the next step while the current one is trained on. The state is that of the steps
    handed out, whatever the thread has read since.

    `skip_bad_records` and `accept_change` are `--data.on-bad-record skip` and `--data.on-change accept`.
    `should_report`: whether this rank, of those that read the same records, reports what is found in them.
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
        skip_bad_records: bool = False,
        accept_change: bool = False,
        should_report: bool = True,
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.sequence_length, self.batch_size, self.grad_accum = sequence_length, batch_size, grad_accum
        self.held_out, self.min_tokens = held_out, min_tokens
        self.streams, self.local_streams = stream_layout(batch_size, grad_accum, data_rank, data_degree)
        self._accept_change, self._should_report = accept_change, should_report
        self._order = order = Order(
            self.streams, self.local_streams, held_out=held_out, holdout=holdout, shuffle=shuffle, seed=seed
        )
        self._settings = {
            "seed": seed,
            "shuffle": shuffle,
            "holdout": holdout,
            "min_tokens": min_tokens,
            "held_out": held_out,
        }
        self._documents = source.open(order)
        self._encode = DocumentEncoder(tokenizer, min_tokens=min_tokens, vocab_size=vocab_size)
        self._log = RecordLog(skip=skip_bad_records, remedy=source.remedy, should_report=should_report)
        self._packers = {
            stream: StreamPacker(stream, self._documents, order, self._encode, self._require_a_document, self._log)
            for stream in self.local_streams
        }
        self._fingerprint: dict[str, Any] | None = None
        self._some_document = False
        self._start = self._cursors = self._read_cursors()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") if prefetch else None
        self._pending: Future[tuple[list[TokenBatch], _Cursors]] | None = None

    def next_step(self) -> list[TokenBatch]:
        """The micro-batches of one optimizer step, on the CPU."""
        if self._thread is None:
            batches, self._cursors = self._prepare()
            return batches
        pending, self._pending = self._pending or self._thread.submit(self._prepare), None
        batches, self._cursors = pending.result()
        self._pending = self._thread.submit(self._prepare)
        return batches

    def _prepare(self) -> tuple[list[TokenBatch], _Cursors]:
        shape = (len(self.local_streams), self.sequence_length)
        arrays = [np.empty(shape, np.int64) for _ in range(4)]
        for row, packer in enumerate(self._packers.values()):
            packer.fill(*(array[row] for array in arrays))
        tensors = [*map(torch.from_numpy, arrays), torch.tensor(self.local_streams)]
        batches = [
            TokenBatch(*parts) for parts in zip(*(tensor.split(self.batch_size) for tensor in tensors), strict=True)
        ]
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
        """Raises UserError unless the run may go on with this corpus.

        It may where the corpus is the same, where all that the run has read of it is the same (which is read again to
        find out), and where a change is accepted.
        """
        check_reading_settings(state["fingerprint"], self.fingerprint)
        cursors: _Cursors = state["streams"]
        saved = state["fingerprint"].get("source") or {}
        if not self.source.same_documents(saved):
            cursors = self._after_a_change(saved, self._local_cursors(cursors))
        self._load_cursors(cursors)
        self._log.skipped, self._log.undecodable = (
            sum(int(cursor.get(count, 0)) for cursor in self._local_cursors(cursors).values())
            for count in ("skipped", "undecodable")
        )

    def _after_a_change(self, saved: dict[str, Any], cursors: dict[int, dict[str, Any]]) -> _Cursors:
        """The cursors to go on from with a corpus that has changed. Raises UserError."""
        self._forget_pending()
        if not self.source.same_numbering(saved):
            why = "its records have other numbers now, or more may have changed than can be told"
        elif reads_the_same(self._documents, self._order, cursors):
            if self._should_report and self._order.local_streams.start == 0:
                logger.warning(
                    "the data (%s) has changed, in no record that was read: the run goes on. What is held out may have"
                    " changed, and evaluations with it",
                    self.source.name,
                )
            # What a reader kept of its place may be of the files as they were.
            return {str(stream): {**cursor, "reader": None} for stream, cursor in cursors.items()}
        else:
            why = "records that this run has read have changed, or it began before they were accounted for"
        if not self._accept_change:
            raise refuse_source(saved, self.fingerprint["source"], why)
        if self._should_report:
            logger.warning(
                "the data (%s) has changed, and --data.on-change accept goes on with it: the run is no longer bit for"
                " bit the one that an unchanged corpus gives; documents of this epoch may be read twice or not at all;"
                " one that was being read is given up where another stands now; evaluations may be of other text",
                self.source.name,
            )
        self._documents.seek({stream: _place(cursor) for stream, cursor in cursors.items()})
        ordered = sorted(cursors.items(), key=lambda item: (item[1]["epoch"], item[1]["position"]))
        return {str(stream): accepted(self._documents, cursor) for stream, cursor in ordered}

    def reset(self) -> None:
        """Back to the first document, as an evaluation does before it starts."""
        self._load_cursors(self._start)

    def describe(self) -> str:
        """One line for logs."""
        side, count = "held-out" if self.held_out else "training", self._documents.count()
        documents = f"; {count:,} {side} documents" if count is not None else f" ({side} documents)"
        streams = f"; streams: {self._documents.describe()}" if isinstance(self._documents, MixedDocuments) else ""
        tokenizer = f"tokenizer {self.tokenizer.name} ({self.tokenizer.vocab_size:,} ids)"
        return f"{self.source.describe()}{documents}{streams}; {tokenizer}"

    def _load_cursors(self, cursors: _Cursors) -> None:
        self._forget_pending()
        local = self._local_cursors(cursors)
        for stream, cursor in local.items():
            self._packers[stream].load_state_dict(cursor)
        self._documents.seek({stream: _place(cursor, cursor.get("reader")) for stream, cursor in local.items()})
        self._cursors = self._read_cursors()

    def _forget_pending(self) -> None:
        if self._pending is not None:
            self._pending.exception()  # waits; that step is thrown away, and its error with it
            self._pending = None

    def _local_cursors(self, cursors: _Cursors) -> dict[int, dict[str, Any]]:
        """Cursors of this rank's streams."""
        for stream in self.local_streams:
            if str(stream) not in cursors:
                raise UserError(f"the checkpoint holds no data position for stream {stream}: resume from another one")
        return {stream: cursors[str(stream)] for stream in self.local_streams}

    def _require_a_document(self) -> None:
        """Called when a stream has found nothing in an epoch: raises UserError unless there is something to find."""
        if self._some_document:
            return
        for name, documents in corpora(self.source, self._documents):
            if not any(self._encode(document) is not None for document in documents.scan()):
                raise self._nothing_in(name)
        self._some_document = True

    def _nothing_in(self, name: str) -> UserError:
        side = "held-out" if self.held_out else "training"
        if self._log.first_problem is not None:
            return UserError(
                f"every {side} document of {name} is empty, too short or passed over ({self._log.first_problem}): give"
                " documents with text"
            )
        if self.min_tokens:
            return UserError(
                f"no {side} document of {name} has --data.min-tokens {self.min_tokens} tokens: lower it, or give longer"
                " documents"
            )
        return UserError(f"every {side} document of {name} is empty: give documents with text")


def _place(cursor: Mapping[str, Any], hint: dict[str, Any] | None = None) -> Place:
    return Place(int(cursor["epoch"]), int(cursor["position"]), hint)
