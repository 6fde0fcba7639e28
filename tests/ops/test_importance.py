"""Importance: its loss is the cross-entropy of attention behind the window, by loops, and its optimum the mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.ops import importance
from pipeline.ops.importance import Importance, ImportanceLoss, importance_loss
from pipeline.ops.rope import Rope, rotate

HEADS, KV_HEADS, DIM, WINDOW, SINKS, SCALE = 4, 2, 8, 6, 1, 0.3
ROPE = Rope(10000.0 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM))


def drawn(tokens: int, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return {
        "q": 3 * noise(1, tokens, HEADS, DIM),
        "k": noise(1, tokens, KV_HEADS, DIM),
        "v": noise(1, tokens, KV_HEADS, DIM),
        "key": noise(KV_HEADS, DIM) / 4,
        "value": noise(KV_HEADS, DIM) / 4,
    }


def loss_of(x: dict[str, Tensor], lengths: list[int], reach: int = 1000) -> ImportanceLoss:
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return importance_loss(
        Importance(x["key"], x["value"]), x["q"], x["k"], x["v"], ROPE.rotation(positions, torch.float64), segments,
        positions >= SINKS,
        window=WINDOW, reach=reach, scale=SCALE,
    )  # fmt: skip


def by_loops(x: dict[str, Tensor], lengths: list[int], every: int, reach: int) -> tuple[Tensor, Tensor]:
    """Cross-entropies times attention, and attention, as sums."""
    nats = attention = torch.zeros((), dtype=torch.float64)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    asking = set(range(every - 1, sum(lengths), every))
    for start, length in zip(starts, lengths, strict=True):
        turns = ROPE.rotation(torch.arange(length)[None], torch.float64)
        q, k = (rotate(x[name][:, start : start + length], turns)[0] for name in ("q", "k"))
        raw, v = (x[name][0, start : start + length] for name in ("k", "v"))
        for head in range(HEADS):
            own = head // (HEADS // KV_HEADS)
            z = DIM**0.5 * raw[:, own] @ x["key"][own]
            z = z + DIM * (v[:, own] / v[:, own].norm(dim=-1, keepdim=True)) @ x["value"][own]
            for t in (t for t in range(length) if start + t in asking):
                given = (q[t, head] @ k[: t + 1, own].T * SCALE).softmax(0)
                behind = torch.tensor([j for j in range(t + 1) if WINDOW < t - j <= WINDOW + reach and j >= SINKS])
                if len(behind):
                    nats = nats - (given[behind] * z[behind].log_softmax(0)).sum()
                    attention = attention + given[behind].sum()
    return nats, attention


@pytest.mark.parametrize("reach", [1000, 9])
@pytest.mark.parametrize("lengths", [[40], [13, 27], [5, 3, 32]], ids=str)
@pytest.mark.parametrize("queries", [64, 10])
def test_it_is_the_cross_entropy_by_loops(
    lengths: list[int], queries: int, reach: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "QUERIES", queries)
    x = drawn(sum(lengths))
    every = 1 if queries == 64 else 4
    maps = [x[name].requires_grad_() for name in ("key", "value")]
    nats, attention = by_loops(x, lengths, every, reach)
    wanted = torch.autograd.grad(nats * every, maps)
    found = loss_of(x, lengths, reach)
    assert found.surrogate == 0
    torch.testing.assert_close(found.nats, nats.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.attention, attention, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(found.surrogate, maps), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_rows_are_apart() -> None:
    parts, lengths = [drawn(40, seed) for seed in (1, 2)], ([40], [13, 27])
    maps = [parts[0][name].requires_grad_() for name in ("key", "value")]
    found = []
    for part, own in zip(parts, lengths, strict=True):
        loss = loss_of(part | dict(zip(("key", "value"), maps, strict=True)), own)
        found.append((loss.nats, loss.attention, *torch.autograd.grad(loss.surrogate, maps)))
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(x)), torch.tensor(x)) for x in lengths])
    positions = torch.stack([torch.cat([torch.arange(one) for one in x]) for x in lengths])
    together = importance_loss(
        Importance(*maps), *(torch.cat([part[name] for part in parts]) for name in ("q", "k", "v")),
        ROPE.rotation(positions, torch.float64), segments, positions >= SINKS, window=WINDOW, reach=1000, scale=SCALE,
    )  # fmt: skip
    slopes = torch.autograd.grad(together.surrogate, maps)
    for one, *summed in zip((together.nats, together.attention, *slopes), *found, strict=True):
        torch.testing.assert_close(one, sum(summed), rtol=1e-10, atol=1e-10)


def test_in_bfloat16_it_is_near_float64() -> None:
    x = drawn(40)
    maps = [x[name].requires_grad_() for name in ("key", "value")]
    wanted = torch.autograd.grad(loss_of(x, [13, 27]).surrogate, maps)
    low = {name: tensor.detach().bfloat16() for name, tensor in x.items()}
    positions = torch.cat([torch.arange(13), torch.arange(27)])[None]
    own = [low[name].requires_grad_() for name in ("key", "value")]
    found = importance_loss(
        Importance(*own), low["q"], low["k"], low["v"], ROPE.rotation(positions, torch.bfloat16),
        torch.repeat_interleave(torch.arange(2), torch.tensor([13, 27]))[None], positions >= SINKS,
        window=WINDOW, reach=1000, scale=SCALE,
    )  # fmt: skip
    for one, other in zip(torch.autograd.grad(found.surrogate, own), wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() < 0.03 * other.norm()


def test_within_the_window_there_is_nothing_to_learn() -> None:
    x = drawn(WINDOW)
    x["key"].requires_grad_()
    found = loss_of(x, [WINDOW])
    assert found.nats == 0 and found.attention == 0
    (slope,) = torch.autograd.grad(found.surrogate, [x["key"]])
    assert not slope.any()


def test_keys_and_values_are_constants() -> None:
    x = drawn(20)
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    loss_of(x, [20]).surrogate.backward()
    assert x["key"].grad is not None and x["value"].grad is not None
    assert all(x[name].grad is None for name in ("q", "k", "v"))


def test_descent_finds_the_keys_that_are_asked_for() -> None:
    """Keys with a mark get more attention by far: a few steps of descent give them the greater weight."""
    x = drawn(64)
    marked = torch.arange(64) % 5 == 0
    x["v"][:, marked, :, 0] = 4
    x["k"][:, marked] += 1.5 * x["q"].unflatten(2, (KV_HEADS, -1)).mean((0, 1, 3))
    x["key"].zero_(), x["value"].zero_()
    maps = [x[name].requires_grad_() for name in ("key", "value")]
    x["q"] = x["q"] + 2
    x["k"][:, marked] += 2
    for _ in range(50):
        slopes = torch.autograd.grad(loss_of(x, [64]).surrogate / 64, maps)
        with torch.no_grad():
            for one, slope in zip(maps, slopes, strict=True):
                one -= 0.01 * slope
    weights = Importance(*(one.detach() for one in maps)).weights(x["k"], x["v"])
    assert (weights[:, marked].mean(1) > 2 * weights[:, ~marked].mean(1)).all()


def test_zero_maps_weigh_all_tokens_the_same_and_weights_stay_finite() -> None:
    x = drawn(20)
    zero = torch.zeros_like(x["key"])
    assert (Importance(zero, zero).weights(x["k"], x["v"]) == 1).all()
    assert (Importance(zero, x["value"]).weights(x["k"], torch.zeros_like(x["v"])) == 1).all()
    weights = Importance(x["key"] * 1e6, zero).weights(x["k"].bfloat16(), x["v"].bfloat16())
    assert weights.dtype == torch.float32 and weights.isfinite().all() and (weights > 0).all()
