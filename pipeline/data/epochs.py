"""The loader of map-style examples: whole epochs, shuffled globally, at a position of a few integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

from pipeline.data.batch import B
from pipeline.data.loader import stream_layout
from pipeline.data.resume import check_fingerprint
from pipeline.data.sources.base import Permutation
from pipeline.errors import UserError

Example = TypeVar("Example", covariant=True)


class Examples(Protocol[Example]):
    """A data set by index, such as a list or a map-style `torch.utils.data.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class EpochPosition:
    """Where a loader is that reads `count` examples epoch after epoch: a position of two integers, and what a resume
    compares. `name` and `fingerprint` (JSON-ready) say what is read; a resume refuses another fingerprint."""

    def __init__(
        self,
        count: int,
        *,
        name: str,
        fingerprint: Mapping[str, Any],
        batch_size: int,
        grad_accum: int = 1,
        data_rank: int = 0,
        data_degree: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        """Raises UserError when there is no example."""
        if count == 0:
            raise UserError(f"{name} holds no example: give data with at least one")
        self.count, self.name, self.batch_size = count, name, batch_size
        self.rows, self._local_rows = stream_layout(batch_size, grad_accum, data_rank, data_degree)
        self._seed, self._shuffle = seed, shuffle
        self._epoch = self._offset = 0
        self.fingerprint: dict[str, Any] = {**fingerprint, "examples": count, "seed": seed, "shuffle": shuffle}

    @property
    def epoch(self) -> int:
        """Epochs that were read to their end."""
        return self._epoch

    def reset(self) -> None:
        """Back to the first step, as an evaluation does before it starts."""
        self._epoch = self._offset = 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "offset": self._offset, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at the example after the last one that was read, also with another global batch."""
        check_fingerprint(state["fingerprint"], self.fingerprint)
        self._epoch, self._offset = int(state["epoch"]), int(state["offset"])


class EpochLoader(EpochPosition, Generic[B]):
    """Every example once per epoch, in a seeded order that is new each epoch, with the contract of `StatefulLoader`.

    The run reads one endless sequence: epoch after epoch, without a gap. Row j of step n, counted from 0, is its
    example n x rows + j, where `rows` is the global batch. So the last batch of an epoch goes on with the next epoch,
    and the step is the same for every layout: rows are divided over data ranks, then over micro-batches. No order is
    stored: an epoch's is a permutation that (seed, epoch) alone decide.

    `collate(examples, rows)` makes a micro-batch; `rows` are its global rows in the step, which noise may depend on.
    """

    def __init__(
        self,
        examples: Examples[Any],
        collate: Callable[[list[Any], range], B],
        *,
        name: str,
        fingerprint: Mapping[str, Any],
        batch_size: int,
        grad_accum: int = 1,
        data_rank: int = 0,
        data_degree: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        """Raises UserError when there is no example."""
        super().__init__(
            len(examples),
            name=name,
            fingerprint=fingerprint,
            batch_size=batch_size,
            grad_accum=grad_accum,
            data_rank=data_rank,
            data_degree=data_degree,
            seed=seed,
            shuffle=shuffle,
        )
        self.examples, self.collate = examples, collate
        self._permutation = lru_cache(maxsize=2)(self._permutation_of)

    def steps(self, epochs: float) -> int:
        """Steps from the start after which so many epochs have been read; the last of them may go on into the next."""
        return math.ceil(epochs * len(self.examples) / self.rows)

    def next_step(self) -> list[B]:
        """The micro-batches of one optimizer step, on the CPU."""
        rows = self._local_rows
        parts = [range(start, start + self.batch_size) for start in range(rows.start, rows.stop, self.batch_size)]
        batches = [self.collate([self._example(row) for row in part], part) for part in parts]
        # Not before: a step that cannot be read leaves the position where it was.
        epochs, self._offset = divmod(self._offset + self.rows, len(self.examples))
        self._epoch += epochs
        return batches

    def _example(self, row: int) -> Any:
        epochs, place = divmod(self._offset + row, len(self.examples))
        return self.examples[self._permutation(self._epoch + epochs)(place) if self._shuffle else place]

    def _permutation_of(self, epoch: int) -> Permutation:
        return Permutation(len(self.examples), "examples", self._seed, epoch)

    def describe(self) -> str:
        """One line for logs."""
        count = len(self.examples)
        return f"{self.name}: {count:,} examples, an epoch in {count / self.rows:,.1f} steps"
