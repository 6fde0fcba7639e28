"""A micro-batch moves as a whole."""

from __future__ import annotations

import dataclasses

import torch

from pipeline.data.batch import TokenBatch


def test_every_tensor_of_a_batch_moves_in_its_place() -> None:
    batch = TokenBatch(*(torch.full((2, 4), value) for value in range(4)), torch.arange(2))
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, TokenBatch)
    for field in dataclasses.fields(TokenBatch):
        there = getattr(moved, field.name)
        assert there.device.type == "meta" and there.shape == getattr(batch, field.name).shape
    back = batch.to(torch.device("cpu"))
    assert all(
        torch.equal(getattr(back, field.name), getattr(batch, field.name)) for field in dataclasses.fields(TokenBatch)
    )
