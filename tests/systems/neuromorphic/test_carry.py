"""The state of streams as the engine keeps it: nothing is lost, and rows go with their streams."""

from __future__ import annotations

import torch

from pipeline.systems.neuromorphic.carry import pack_carry, unpack_carry
from pipeline.systems.neuromorphic.stream_tensors import named
from tests.systems.neuromorphic.small import documents, small_model


def test_a_state_comes_back_from_its_carry() -> None:
    model = small_model()
    ids = torch.randint(1, 20, (3, 16), generator=torch.Generator().manual_seed(0))
    labels, segments, positions = documents(ids)
    state = model(ids, labels, segments, positions).state
    carry = pack_carry(state)
    assert len(carry) == 17 and all(entry.streams == 0 and entry.heads is None for entry in carry.values())
    assert all(entry.tensor.shape[0] == 3 for entry in carry.values())
    found = unpack_carry(carry)
    assert found is not None
    before, after = named(state), named(found)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_of_streams_without_a_past_there_is_no_state() -> None:
    assert unpack_carry({}) is None
