"""The loader of token files: windows in a global order, an optimizer step at a time, at a position of few integers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.data.loader import stream_layout
from pipeline.data.resume import check_reading_settings, refuse_source
from pipeline.data.tokens.files import check_ids
from pipeline.data.tokens.windows import Interleaving, Windows, shuffled
from pipeline.errors import UserError

READ_AHEAD = 64
"""Windows of a rank, of at least one step, that a file is told of before they are read: one behind a URL fetches them
meanwhile."""

logger = logging.getLogger(__name__)

_State = Sequence[int]
"""Windows that each source has given since the start of the run."""


class WindowLoader:
    """Row i of every step is window n x rows + i of the run, whatever the layout of ranks.

    The windows of a source are read once per epoch, in an order that (seed, source, epoch) alone decide. A window of T
    ids has T - 1 labels: what follows its last id belongs to another window. `eos_id`: documents end with it and are
    kept apart (`segment_ids`, `positions`, labels); None: a window is one document.
    With `prefetch` a thread prepares the next step while the current one is trained on.
    """

    def __init__(
        self,
        sources: Sequence[Windows],
        ratios: Sequence[Fraction],
        *,
        batch_size: int,
        vocab_size: int,
        fingerprint: Callable[[], Mapping[str, Any]],
        grad_accum: int = 1,
        data_rank: int = 0,
        data_degree: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        eos_id: int | None = None,
        prefetch: bool = False,
        accept_change: bool = False,
        makers: Mapping[str, str] | None = None,
    ) -> None:
        """`fingerprint` gives that of the files, which it reads for it, and what else decides what is read; `makers`
        the tokenizers that made them. Raises UserError where a source has no window."""
        self.sources, self.ratios, self.batch_size = list(sources), list(ratios), batch_size
        self.length, self._vocab_size, self._eos_id = sources[0].length, vocab_size, eos_id
        self.rows, self._local = stream_layout(batch_size, grad_accum, data_rank, data_degree)
        self._seed, self._shuffle, self._accept_change = seed, shuffle, accept_change
        for source in sources:
            if not len(source):
                raise _too_short(source)
        self.order = Interleaving(ratios)
        self._make_fingerprint, self._makers = fingerprint, dict(makers or {})
        self._taken: _State = [0] * len(sources)
        self._told: _State = self._taken
        """Up to where files have been told of what will be read."""
        # Of files on disk the system reads ahead itself.
        self._tells = any(file.is_remote for source in sources for file in source.files)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") if prefetch else None
        self._pending: Future[tuple[list[TokenBatch], _State]] | None = None

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must agree on."""
        settings = {"seed": self._seed, "shuffle": self._shuffle, "sequence_length": self.length}
        return {**self._make_fingerprint(), **settings}

    def next_step(self) -> list[TokenBatch]:
        """The micro-batches of one optimizer step, on the CPU."""
        if self._thread is None:
            batches, self._taken = self._prepare(self._taken)
            return batches
        pending, self._pending = self._pending or self._thread.submit(self._prepare, self._taken), None
        batches, self._taken = pending.result()
        self._pending = self._thread.submit(self._prepare, self._taken)
        return batches

    def _prepare(self, taken: _State) -> tuple[list[TokenBatch], _State]:
        sources, windows, after = self.windows_of_step(taken)
        if self._tells:
            self._tell(taken)
        ids = np.empty((len(self._local), self.length), np.int64)
        for row, number in enumerate(self._local):
            file, start = self.sources[sources[number]].place(int(windows[number]))
            ids[row] = file.read(start, self.length)
        if ids.max() >= self._vocab_size:
            self._refuse_ids(ids, sources, windows)
        step = sum(taken) // self.rows
        tensors = (*self._rows(ids, step), torch.tensor(self._local))
        parts = zip(*(tensor.split(self.batch_size) for tensor in tensors), strict=True)
        return [TokenBatch(*part) for part in parts], after

    def _tell(self, taken: _State) -> None:
        """Tells the files of the windows of this step and the next ones."""
        if sum(self._told) < sum(taken):
            self._told = taken
        steps = 1 + max(1, READ_AHEAD // len(self._local))
        while sum(self._told) < sum(taken) + steps * self.rows:
            sources, windows, self._told = self.windows_of_step(self._told)
            for number in self._local:
                file, start = self.sources[sources[number]].place(int(windows[number]))
                file.ahead(start, self.length)

    def windows_of_step(self, taken: _State) -> tuple[np.ndarray, np.ndarray, _State]:
        """(source, window in it) of each row of the step that begins at `taken`, [rows] int64, and where it ends."""
        sources, numbers, after = self.order.next(taken, self.rows)
        windows = np.empty(self.rows, np.int64)
        for source in np.unique(sources).tolist():
            here = sources == source
            windows[here] = shuffled(self.sources[source], source, numbers[here], self._seed, self._shuffle)
        return sources, windows, after

    def _rows(self, ids: np.ndarray, step: int) -> tuple[torch.Tensor, ...]:
        """input_ids, labels, segment_ids, positions [rows, T] int64 of ids [rows, T]."""
        labels = np.full_like(ids, IGNORED)
        labels[:, :-1] = ids[:, 1:]
        # No two windows of a row have a segment in common, also where each holds many documents.
        segments = np.full_like(ids, step * self.length)
        positions = np.tile(np.arange(self.length), (len(ids), 1))
        if self._eos_id is not None:
            ends = ids[:, :-1] == self._eos_id
            labels[:, :-1][ends] = IGNORED
            segments[:, 1:] += np.cumsum(ends, axis=1)
            starts = np.zeros_like(ids)
            starts[:, 1:] = np.where(ends, positions[:, 1:], 0)
            positions -= np.maximum.accumulate(starts, axis=1)
        return tuple(map(torch.from_numpy, (ids, labels, segments, positions)))

    def _refuse_ids(self, ids: np.ndarray, sources: np.ndarray, windows: np.ndarray) -> None:
        row = int(np.argmax(ids.max(axis=1) >= self._vocab_size))
        number = self._local[row]
        file, start = self.sources[sources[number]].place(int(windows[number]))
        check_ids(file.name, start, ids[row], self._vocab_size)

    def describe(self) -> str:
        """One line for logs."""
        parts = []
        for source, ratio in zip(self.sources, self.ratios, strict=True):
            share = f"{float(ratio):.3g} of " if len(self.sources) > 1 else ""
            tokens, steps = len(source) * self.length, len(source) / (self.rows * float(ratio))
            parts.append(
                f"{share}{source.name}: {len(source.files):,} token files, {len(source):,} windows"
                f" ({tokens:,} tokens), an epoch in {steps:,.1f} steps"
            )
        short = [file.name for source in self.sources for file in source.too_short]
        left_out = f"; {len(short):,} files shorter than a window left out, such as {short[0]}" if short else ""
        mask = "" if self._eos_id is None else f"; documents kept apart at id {self._eos_id}"
        return "; ".join(parts) + left_out + mask

    @property
    def epochs(self) -> list[float]:
        """Epochs that each source has been read."""
        return [taken / len(source) for taken, source in zip(self._taken, self.sources, strict=True)]

    def reset(self) -> None:
        """Back to the first step, as an evaluation does before it starts."""
        self._go_to([0] * len(self.sources))

    def _go_to(self, taken: _State) -> None:
        if self._pending is not None:
            self._pending.exception()  # waits; that step is thrown away, and its error with it
            self._pending = None
        self._taken = self._told = taken

    def state_dict(self) -> dict[str, Any]:
        return {
            "windows": sum(self._taken),
            "taken": list(self._taken),
            "windows_per_epoch": [len(source) for source in self.sources],
            "tokenizers": self._makers,
            "vocab_size": self._vocab_size,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at the window after the last one that was read. Raises UserError for other data."""
        saved = state["fingerprint"]
        check_reading_settings(saved, self.fingerprint)
        if saved.get("source") != self.fingerprint["source"]:
            if not self._accept_change:
                why = "windows that this run has read, or has yet to read, may be others"
                raise refuse_source(saved.get("source"), self.fingerprint["source"], why)
            if len(state["taken"]) != len(self.sources):
                raise UserError(
                    f"--data.tokens has {len(self.sources)} sources and the checkpoint {len(state['taken'])}: their"
                    " positions mean nothing to each other: begin a new run with --init-from"
                )
            if self._local.start == 0:
                logger.warning(
                    "the token files have changed, and --data.on-change accept goes on with them: windows of this epoch"
                    " may be read twice or not at all"
                )
        self._go_to([int(count) for count in state["taken"]])


def _too_short(source: Windows) -> UserError:
    longest = max(file.tokens for file in source.files)
    if longest >= source.length:
        return UserError(
            f"{source.name} has too few windows of --sequence-length {source.length} to hold some out: give more"
            " tokens, or --data.held-out-tokens"
        )
    return UserError(
        f"{source.name} has no window of --sequence-length {source.length}: its longest file has {longest} tokens: give"
        " longer files or shorter sequences"
    )
