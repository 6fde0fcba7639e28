"""Attention to a window and slots, against loops over tokens; across documents, steps and precisions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.ops.attention import Rope, WindowCarry, plan_window_attention, window_attention
from pipeline.ops.attention_sinks import CarryPlan
from pipeline.ops.attention_slots import plan_slots, slot_attention, slots_by_chunk
from pipeline.ops.slots import Slots
from tests.ops import slots_reference

HEADS, KV_HEADS, DIM, WINDOW, SLOTS, CHUNK = 4, 2, 8, 6, 5, 3
SIZES = {"window": WINDOW, "slots": SLOTS, "chunk": CHUNK, "reach": 11}
SCALE = DIM**-0.5
ROPE = Rope(100.0 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM), attention_scaling=1.2)


def inputs(tokens: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *shape, generator=generator, dtype=torch.float64)

    return {"q": noise(HEADS, DIM), "k": noise(KV_HEADS, DIM), "v": noise(KV_HEADS, DIM), "shift": noise(HEADS)}


def row(lengths: list[int]) -> tuple[Tensor, Tensor]:
    segments = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])
    return segments[None], torch.cat([torch.arange(length) for length in lengths])[None]


def plans(segments: Tensor, positions: Tensor, carry: WindowCarry | None, sinks: int, dtype: torch.dtype) -> Any:
    """Of the slots, and of what the next step finds of the window."""
    before = None if carry is None else (carry.segment_ids, carry.positions)
    rope = replace(ROPE, inverse_frequencies=ROPE.inverse_frequencies.to(segments.device))
    own = plan_slots(segments, positions, before, rope=rope, sinks=sinks, dtype=dtype, **SIZES)
    return own, CarryPlan.build(segments, positions, before, window=WINDOW, sinks=sinks)


def attended(
    x: dict[str, Tensor], lengths: list[int], *, sinks: int, cuts: tuple[int, ...] = ()
) -> tuple[Tensor, Slots]:
    """The output of a row of documents in steps that end at `cuts`, and the slots after it, on the device of `x`."""
    segments, positions = (part.to(x["k"].device) for part in row(lengths))
    carry: WindowCarry | None = None
    slots = Slots.empty(1, KV_HEADS, SLOTS, DIM, x["k"])
    outs = []
    for start, end in zip((0, *cuts), (*cuts, segments.shape[1]), strict=True):
        q, k, v, shift = (x[name][:, start:end] for name in ("q", "k", "v", "shift"))
        own, kept = plans(segments[:, start:end], positions[:, start:end], carry, sinks, q.dtype)
        found = slots_by_chunk(k, v, own, carry, slots)
        outs.append(slot_attention(q, k, v, own, carry, *found[:4], shift, SCALE))
        carry = kept.cut(k, v, carry)
        slots = found.after
    return torch.cat(outs, dim=1), slots


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("lengths", [[40], [4, 30], [20, 1, 19], [9, 31]], ids=str)
def test_it_is_the_token_loop(lengths: list[int], sinks: int) -> None:
    x = inputs(sum(lengths))
    found, _ = attended(x, lengths, sinks=sinks)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        for head in range(HEADS):
            own = head // (HEADS // KV_HEADS)
            expected, _ = slots_reference.attention(
                x["q"][0, part, head], x["k"][0, part, own], x["v"][0, part, own], x["shift"][0, part, head], start,
                frequencies=ROPE.inverse_frequencies, sinks=sinks, scale=SCALE * ROPE.attention_scaling**2, **SIZES,
            )  # fmt: skip
            torch.testing.assert_close(found[0, part, head], expected, rtol=1e-10, atol=1e-10)
        start += length


def test_within_the_window_and_its_sinks_it_is_attention_to_the_window() -> None:
    lengths = [WINDOW + 2, WINDOW + 2, 5]
    x = inputs(sum(lengths))
    found, slots = attended(x, lengths, sinks=2)
    segments, positions = row(lengths)
    plan = plan_window_attention(
        segments, positions, rope=ROPE, window=WINDOW, sinks=2, carry=None, backend="sdpa", dtype=torch.float64
    )
    expected, _ = window_attention(x["q"], x["k"], x["v"], plan, None, scale=SCALE)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not slots.counts.any()


@pytest.mark.parametrize("cuts", [(CHUNK,), (12, 24), (6, 9, 33)])
@pytest.mark.parametrize("lengths", [[40], [13, 27]], ids=str)
def test_steps_equal_one_pass(lengths: list[int], cuts: tuple[int, ...]) -> None:
    x = inputs(40)
    whole, after = attended(x, lengths, sinks=2)
    found, slots = attended(x, lengths, sinks=2, cuts=cuts)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    for one, other in zip(slots, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_equal_keys_in_one_slot_are_full_attention_to_each() -> None:
    """Where merging loses nothing: the keys behind the window are as many kinds as there are slots, without RoPE."""
    tokens, still = 48, Rope(torch.zeros(DIM // 2, dtype=torch.float64))
    x = inputs(tokens)
    kinds = torch.arange(tokens) % 2
    x["k"], x["v"] = x["k"][:, kinds], x["v"][:, kinds]
    segments, positions = row([tokens])
    plan = plan_slots(segments, positions, None, rope=still, sinks=0, dtype=torch.float64, **SIZES)
    found = slots_by_chunk(x["k"], x["v"], plan, None, Slots.empty(1, KV_HEADS, SLOTS, DIM, x["k"]))
    out = slot_attention(x["q"], x["k"], x["v"], plan, None, *found[:4], torch.zeros_like(x["shift"]), SCALE)
    q, k, v = (value.transpose(1, 2) for value in (x["q"], x["k"], x["v"]))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-10, atol=1e-10)


def errors(dtype: torch.dtype, lengths: list[int], cuts: tuple[int, ...] = (), device: str = "cpu") -> list[float]:
    """Of the output and of every gradient, relative to float64 on the CPU."""
    # Slots are chosen by distances: those of the same values.
    rounded = {name: value.to(dtype) for name, value in inputs(sum(lengths)).items()}
    exact = {name: value.double().requires_grad_() for name, value in rounded.items()}
    rough = {name: value.to(device).requires_grad_() for name, value in rounded.items()}
    coefficients = inputs(sum(lengths), seed=1)["q"]
    outs = []
    for x in (exact, rough):
        out, _ = attended(x, lengths, sinks=2, cuts=cuts)
        (out * coefficients.to(out)).sum().backward()
        outs.append(out)
    found = []
    for other, one in [(outs[1], outs[0])] + [(rough[name].grad, exact[name].grad) for name in exact]:
        assert other is not None and one is not None and bool(one.any())
        found.append(float((other.detach().cpu().double() - one.detach()).norm() / one.detach().norm()))
    return found


LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-2}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_gradients_and_values_of_lower_precisions_are_near_those_of_float64(dtype: torch.dtype) -> None:
    assert max(errors(dtype, [40])) < LIMITS[dtype]


def test_fewer_slots_than_tokens_of_a_chunk_are_refused() -> None:
    segments, positions = row([8])
    with pytest.raises(ValueError, match="2 slots cannot take a chunk of 3 tokens"):
        plan_slots(
            segments, positions, None, rope=ROPE, window=4, sinks=0, slots=2, chunk=3, reach=4, dtype=torch.float32
        )
