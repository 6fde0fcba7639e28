"""The loader of peptides: epochs of known length, at an exact position, the same batches on any number of ranks."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from pipeline.data.epochs import EpochPosition
from pipeline.data.sources.base import Permutation
from pipeline.systems.mimir.peptides import INTERACTING, PeptideBatch, Peptides


class PeptideLoader(EpochPosition):
    """Batches of peptides, with the contract of `StatefulLoader`.

    An epoch has as many examples as `peptides`; its last batch has rows of weight 0 where they do not fill it, and so
    the next epoch begins with a batch of its own. Row j of a step is a function of (seed, epoch, examples of the epoch
    before the step, j) alone: rows are divided over data ranks, then over micro-batches, and no order is stored.

    `balanced`: background and interacting peptides alternate, each drawn without replacement until all have been. Then
    the rarer ones are seen several times an epoch, and not all of the others. Without `shuffle`, the order is that of
    `peptides`. `fingerprint`: of the data, which a resumed run must agree on. `domain`: as in `PeptideBatch`.
    """

    def __init__(
        self,
        peptides: Peptides,
        *,
        name: str,
        fingerprint: str,
        batch_size: int,
        grad_accum: int = 1,
        data_rank: int = 0,
        data_degree: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        balanced: bool = False,
        domain: str = "train",
    ) -> None:
        """Raises UserError when there is no peptide."""
        super().__init__(
            len(peptides),
            name=name,
            fingerprint={"source": {"digest": fingerprint}},
            batch_size=batch_size,
            grad_accum=grad_accum,
            data_rank=data_rank,
            data_degree=data_degree,
            seed=seed,
            shuffle=shuffle,
        )
        self.peptides, self.domain = peptides, domain
        kinds = [np.flatnonzero(peptides.labels == INTERACTING), np.flatnonzero(peptides.labels != INTERACTING)]
        self._kinds = kinds if balanced and all(map(len, kinds)) else None
        self._permutation = lru_cache(maxsize=8)(self._permutation_of)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that read all examples of an epoch."""
        return math.ceil(len(self.peptides) / self.rows)

    def next_step(self) -> list[PeptideBatch]:
        """The micro-batches of one optimizer step, on the CPU."""
        count = len(self.peptides)
        places = self._offset + np.arange(self._local_rows.start, self._local_rows.stop)
        weights = (places < count).astype(np.float32)
        places %= count
        chosen, draws = self._chosen(places), self._epoch * count + places
        tensors = {
            "letters": torch.from_numpy(self.peptides.letters[chosen].astype(np.int64)),
            "lengths": torch.from_numpy(self.peptides.lengths[chosen].astype(np.int64)),
            "labels": torch.from_numpy(self.peptides.labels[chosen].astype(np.int64)),
            "targets": torch.from_numpy(self.peptides.targets[chosen].astype(np.int64)),
            "weights": torch.from_numpy(weights),
            "draws": torch.from_numpy(draws),
            "epochs": torch.from_numpy((draws / count).astype(np.float32)),
        }
        parts = {name: tensor.split(self.batch_size) for name, tensor in tensors.items()}
        batches = [
            PeptideBatch(**dict(zip(parts, values, strict=True)), domain=self.domain)
            for values in zip(*parts.values(), strict=True)
        ]
        self._offset += self.rows
        if self._offset >= count:
            self._epoch, self._offset = self._epoch + 1, 0
        return batches

    def _chosen(self, places: np.ndarray) -> np.ndarray:
        """Indices of the peptides at `places` of this epoch."""
        count = len(self.peptides)
        if self._kinds is None:
            return self._permuted(count, self._epoch * count + places, 0)
        chosen = np.empty_like(places)
        for number, kind in enumerate(self._kinds):
            mine = places % 2 == number
            per_epoch = (count + 1 - number) // 2
            drawn = self._epoch * per_epoch + places[mine] // 2
            chosen[mine] = kind[self._permuted(len(kind), drawn, 1 + number)]
        return chosen

    def _permuted(self, count: int, drawn: np.ndarray, kind: int) -> np.ndarray:
        """What the draws `drawn`, counted over the run, give of range(count): all of it, in a new order each time."""
        passes, places = np.divmod(drawn, count)
        if not self._shuffle:
            return places
        for number in np.unique(passes).tolist():
            mine = passes == number
            places[mine] = self._permutation(count, kind, number).many(places[mine])
        return places

    def _permutation_of(self, count: int, kind: int, number: int) -> Permutation:
        return Permutation(count, "peptides", kind, self._seed, number)

    def describe(self) -> str:
        """One line for logs."""
        interacting = int((self.peptides.labels == INTERACTING).sum())
        balanced = ", drawn equally often" if self._kinds is not None else ""
        return (
            f"{self.name}: {interacting:,} interacting and {len(self.peptides) - interacting:,} background peptides"
            f"{balanced}, an epoch in {self.steps_per_epoch:,} steps"
        )
