"""The cache of keys against attention's definition, one token at a time, and against the passes it exchanges with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops.attention import Rope, plan_window_attention, window_attention
from pipeline.ops.key_cache import KeyCache, plan_token
from tests.ops.attention_reference import reference_attention

DOUBLE = torch.float64
DIM = 8
ROPE = Rope(100.0 ** -(torch.arange(0, DIM, 2, dtype=DOUBLE) / DIM), 1.1)


def tokens(rows: int, count: int, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((rows, count, n, DIM) for n in (heads, kv_heads, kv_heads))
    return [torch.randn(shape, generator=generator, dtype=DOUBLE) for shape in shapes]


def expected(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: int) -> Tensor:
    positions = torch.arange(q.shape[1]).expand(q.shape[:2])
    scaled = ROPE.attention_scaling * q, ROPE.attention_scaling * k
    frequencies = ROPE.inverse_frequencies
    return reference_attention(*scaled, v, torch.zeros_like(positions), positions, frequencies, window, sinks)


def stepped(cache: KeyCache, lengths: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Output [rows, heads, dim] of one token per row, [rows, heads, dim] each."""
    plan = plan_token(lengths, rope=ROPE, window=cache.window, sinks=cache.sinks, like=q)
    return cache.attend(q[:, :, None], k[:, :, None], v[:, :, None], plan, DIM**-0.5)[:, :, 0]


@settings(max_examples=10, deadline=None)
@given(window=st.one_of(st.none(), st.integers(1, 24)), sinks=st.integers(0, 4), rows=st.integers(1, 2))
def test_token_by_token_it_is_the_definition(window: int | None, sinks: int, rows: int) -> None:
    sinks = 0 if window is None else sinks
    q, k, v = tokens(rows, 22)
    cache = KeyCache.empty(rows, 2, DIM, window=window, sinks=sinks, like=q)
    found = []
    for place in range(22):
        found.append(stepped(cache, torch.full((rows,), place), q[:, place], k[:, place], v[:, place]))
    torch.testing.assert_close(torch.stack(found, 1), expected(q, k, v, window, sinks), rtol=1e-10, atol=1e-10)
    assert cache.slots <= (2 * 22 if window is None else window)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (10, 3), (20, 2)])
def test_rows_at_different_places(window: int | None, sinks: int) -> None:
    """Joined, selected and restored; each row is as it is alone."""
    q, k, v = tokens(3, 40, 2, 1)
    want = expected(q, k, v, window, sinks)
    lengths, parts = torch.tensor([0, 7, 25]), []
    for row, length in enumerate(lengths.tolist()):
        parts.append(KeyCache.empty(1, 1, DIM, window=window, sinks=sinks, like=q))
        for place in range(length):
            at = (slice(row, row + 1), place)
            stepped(parts[row], torch.tensor([place]), q[at], k[at], v[at])
    cache, order = KeyCache.join(parts), torch.arange(3)
    for step in range(15):
        if step == 4:
            order = torch.tensor([2, 0, 1])
            cache, lengths = cache.select(order), lengths[order]
        if step == 8:
            tensors = {name: x.clone() for name, x in cache.tensors(lengths).items()}
            cache = KeyCache.empty(3, 1, DIM, window=window, sinks=sinks, like=q).restored(tensors, lengths, ROPE)
        at = (order, lengths)
        torch.testing.assert_close(stepped(cache, lengths, q[at], k[at], v[at]), want[at], rtol=1e-10, atol=1e-10)
        lengths = lengths + 1


@pytest.mark.parametrize("length", [1, 3, 11, 12, 29])
def test_what_a_parallel_pass_carries_becomes_a_cache_and_back(length: int) -> None:
    window, sinks = 11, 3
    q, k, v = tokens(2, 30)
    positions = torch.arange(length).expand(2, -1)
    plan = plan_window_attention(
        torch.zeros_like(positions), positions, rope=ROPE, window=window, sinks=sinks, carry=None, backend="sdpa",
        dtype=DOUBLE,
    )  # fmt: skip
    _, carry = window_attention(q[:, :length], k[:, :length], v[:, :length], plan, None)
    cache = KeyCache.empty(2, 2, DIM, window=window, sinks=sinks, like=q)
    assert cache.carry(0, window) is None
    cache.load(carry, length, ROPE)
    back = cache.carry(length, window)
    assert back is not None
    for name, x in carry._asdict().items():
        torch.testing.assert_close(getattr(back, name), x, rtol=0, atol=0, msg=name)
    found = stepped(cache, torch.full((2,), length), q[:, length], k[:, length], v[:, length])
    torch.testing.assert_close(found, expected(q, k, v, window, sinks)[:, length], rtol=1e-10, atol=1e-10)


def test_what_leaves_is_what_stood_a_window_before() -> None:
    window = 5
    q, k, v = tokens(2, 12)
    cache = KeyCache.empty(2, 2, DIM, window=window, sinks=2, like=q)
    for place in range(12):
        plan = plan_token(torch.full((2,), place), rope=ROPE, window=window, sinks=2, like=q)
        key, value = cache.leaving(plan)
        cache.attend(*(x[:, place, :, None] for x in (q, k, v)), plan, 1.0)
        if place >= window:
            assert torch.equal(key[:, 0], k[:, place - window]) and torch.equal(value[:, 0], v[:, place - window])


def test_tensors_of_another_shape_are_refused() -> None:
    q, k, v = tokens(2, 3)
    cache = KeyCache.empty(2, 2, DIM, window=5, sinks=2, like=q)
    stepped(cache, torch.zeros(2, dtype=torch.int64), q[:, 0], k[:, 0], v[:, 0])
    tensors = cache.tensors(torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"keys is \[2, 2, 3, 8\]; expected \[2, 2, 5, 8\]"):
        cache.restored(tensors, torch.tensor([1, 3]), ROPE)
