"""States that say which token they are of, and passes over documents that give them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.data.loader import PassLoader
from pipeline.systems.cvfp.data.states import FrozenStates, states_key
from pipeline.systems.cvfp.documents import DocumentBatch
from tests.systems.cvfp.data.harness import random_documents

WIDTH = 3
DOCUMENTS = random_documents([2 + index % 4 for index in range(61)], training=55)
KEY = states_key(DOCUMENTS, "weights", "document", WIDTH)
ONE = Topology()


def loader(topology: Topology, *, stream: bool = False, rows: int = 12) -> PassLoader:
    return PassLoader(
        DOCUMENTS,
        held_out=False,
        length=5,
        batch_size=rows // topology.data,
        data_rank=topology.data_rank,
        data_degree=topology.data,
        stream=stream,
    )


def states_of(batch: DocumentBatch) -> Tensor:
    """Numbers that the place of a token in the data decides [rows, L, D]; beyond a row's end they are of no token."""
    places = batch.first[:, None] + torch.arange(batch.ids.shape[1])
    return torch.stack([places, batch.ids, -places], dim=-1).double()


def one_pass(passes: PassLoader, slots: int | None = None) -> Iterator[tuple[DocumentBatch, Tensor]]:
    for _ in range(passes.slots if slots is None else slots):
        for batch in passes.next_step():
            yield batch, states_of(batch)


def check(found: FrozenStates, passes: PassLoader) -> None:
    for _ in range(passes.slots):
        for batch in passes.next_step():
            expected = states_of(batch) * batch.mask[:, :, None]
            torch.testing.assert_close(found.of(batch), expected.float(), rtol=0, atol=0)
