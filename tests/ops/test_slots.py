"""What is stored in slots: nothing is lost but by merging, and the sums stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops.slots import Slots, shuffle, store

BATCH, HEADS, DIM = 2, 3, 4


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def order(count: int) -> Tensor:
    return torch.tensor(shuffle(count))


def filled(slots: int, tokens: int, rounds: int, seed: int) -> tuple[Slots, Tensor, Tensor, Tensor]:
    """The slots after so many rounds, and all keys, values and what was taken of them."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (noise(BATCH, rounds * tokens, HEADS, DIM, seed=seed + part) for part in (1, 2))
    taken = torch.rand(BATCH, rounds * tokens, generator=generator) < 0.7
    found = Slots.empty(BATCH, HEADS, slots, DIM, k)
    for start in range(0, rounds * tokens, tokens):
        part = slice(start, start + tokens)
        found = store(found, k[:, part], v[:, part], taken[:, part], order(slots + tokens))
    return found, k, v, taken


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 8), st.integers(1, 6), st.integers(0, 99))
def test_counts_and_sums_are_those_of_the_tokens(tokens: int, more: int, rounds: int, seed: int) -> None:
    slots = tokens + more
    found, k, v, taken = filled(slots, tokens, rounds, seed)
    number = taken.sum(1)
    assert torch.equal(found.counts.sum(2), number[:, None].expand(-1, HEADS).double())
    assert torch.equal((found.counts > 0).sum(2), number.clamp(max=slots)[:, None].expand(-1, HEADS))
    for mean, all_tokens in ((found.keys, k), (found.values, v)):
        total = (all_tokens * taken[..., None, None]).sum(1)
        torch.testing.assert_close((mean * found.counts[..., None]).sum(2), total, rtol=1e-10, atol=1e-10)
    empty = found.counts == 0
    assert not found.keys[empty].any() and not found.ages[empty].any()
    used = (found.counts > 0).long()
    assert torch.equal(used, used.sort(dim=2, descending=True).values), "those in use come first"


def test_while_there_is_room_every_token_has_a_slot_of_its_own() -> None:
    found, k, v, taken = filled(slots=24, tokens=6, rounds=4, seed=0)
    for row in range(BATCH):
        number = int(taken[row].sum())
        for head in range(HEADS):
            kept = {tuple(pair) for pair in torch.cat([found.keys, found.values], -1)[row, head, :number].tolist()}
            assert kept == {tuple(pair) for pair in torch.cat([k, v], -1)[row, taken[row], head].tolist()}
        ages = (24 - taken[row].nonzero().squeeze(1)).double()
        assert torch.equal(found.ages[row, 0, :number].sort().values, ages.sort().values)


def test_equal_keys_are_merged_first() -> None:
    """Five kinds of keys, each many times: five slots and a few more hold them without an error."""
    kinds = noise(5, DIM, seed=3)
    drawn = torch.randint(5, (96,), generator=torch.Generator().manual_seed(4))
    found = Slots.empty(1, 1, 16, DIM, kinds)
    for part in drawn.split(8):
        keys = kinds[part][None, :, None]
        found = store(found, keys, keys, torch.ones(1, 8, dtype=torch.bool), order(24))
    nearest = torch.cdist(found.keys[0, 0], kinds).min(1).values
    assert nearest.max() < 1e-9
    assert found.counts.sum() == 96


def test_the_younger_a_key_the_longer_it_stays_alone() -> None:
    k = noise(1, 256, HEADS, DIM, seed=5)
    found = Slots.empty(1, HEADS, 64, DIM, k)
    for part in k.split(8, dim=1):
        found = store(found, part, part, torch.ones(1, 8, dtype=torch.bool), order(72))
    alone = found.ages[found.counts == 1]
    young, old = (int(((alone > low) & (alone <= low + 32)).sum()) for low in (0, 128))
    assert young > 0.3 * 32 * HEADS and old < 0.25 * young


def test_rows_are_forgotten_apart() -> None:
    found, *_ = filled(slots=8, tokens=4, rounds=3, seed=1)
    kept = found.where(torch.tensor([True, False]))
    for before, after in zip(found, kept, strict=True):
        assert torch.equal(after[0], before[0]) and not after[1].any()


def test_more_tokens_than_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens at once into 8 slots"):
        store(Slots.empty(1, 1, 8, 2, torch.zeros(1)), torch.zeros(1, 9, 1, 2), torch.zeros(1, 9, 1, 2),
              torch.ones(1, 9, dtype=torch.bool), order(17))  # fmt: skip


def test_the_shuffle_is_a_permutation_and_always_the_same() -> None:
    assert sorted(shuffle(7)) == list(range(7)) and shuffle(7) == shuffle(7)
