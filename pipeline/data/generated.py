"""What loaders of made-up sequences share: their streams, and the position in documents that go on over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.loader import stream_layout
from pipeline.data.resume import check_fingerprint


class GeneratedStreams:
    """Rows that depend on (seed, split, stream) and a position alone, for a loader with the contract of
    `StatefulLoader`."""

    def __init__(
        self,
        task: str,
        settings: Mapping[str, Any],
        *,
        sequence_length: int,
        batch_size: int,
        grad_accum: int = 1,
        data_rank: int = 0,
        data_degree: int = 1,
        seed: int = 0,
        held_out: bool = False,
    ) -> None:
        """`settings` of the `task` decide the rows: a resume compares them, and `task` is what it calls them."""
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.streams, self.local_streams = stream_layout(batch_size, grad_accum, data_rank, data_degree)
        self._key = (seed, "held out" if held_out else "training")
        self.fingerprint: dict[str, Any] = {
            "streams": self.streams,
            task: {"sequence_length": self.sequence_length, **settings},
            "seed": seed,
            "held_out": held_out,
        }

    def _micro_batches(self, rows: Sequence[Sequence[np.ndarray]]) -> list[tuple[Tensor, ...]]:
        """By micro-batch, what a `TokenBatch` is made of: the arrays [T] of the local streams (ids, labels, segment
        ids, positions, and others) as tensors [rows, T], and the global stream ids [rows] where they stand in it."""
        tensors = [torch.from_numpy(np.stack(arrays)) for arrays in zip(*rows, strict=True)]
        tensors.insert(4, torch.tensor(self.local_streams))
        return list(zip(*(tensor.split(self.batch_size) for tensor in tensors), strict=True))


class GeneratedDocuments(GeneratedStreams):
    """Streams of documents, one after the other; each stands at an offset into one of them."""

    def __init__(self, task: str, settings: Mapping[str, Any], **layout: Any) -> None:
        super().__init__(task, settings, **layout)
        self._documents: dict[int, Any] = {}
        """The document that each stream stands in, once it has been made."""
        self.reset()

    def state_dict(self) -> dict[str, Any]:
        places = {str(i): {"document": document, "offset": offset} for i, (document, offset) in self._places.items()}
        return {"streams": places, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_fingerprint(state["fingerprint"], self.fingerprint)
        places = {i: state["streams"][str(i)] for i in self.local_streams}
        self._places = {i: (int(place["document"]), int(place["offset"])) for i, place in places.items()}
        self._documents.clear()

    def reset(self) -> None:
        """Back to the first step, as an evaluation does before it starts."""
        self._places = dict.fromkeys(self.local_streams, (0, 0))
        self._documents.clear()
