"""Attention to a window and slots, against loops over tokens; across documents, steps and precisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.ops import attention_flex, native
from pipeline.ops.attention import Rope, WindowCarry, plan_window_attention, window_attention
from pipeline.ops.attention_flex import own_block_mask
from pipeline.ops.attention_sinks import CarryPlan
from pipeline.ops.attention_slots import plan_slots, slot_attention, slots_by_chunk
from pipeline.ops.attention_slots_native import TOLERANCE, takes
from pipeline.ops.importance import Importance
from pipeline.ops.slots import SlotMaps, Slots
from tests.ops import slots_reference
from tests.ops.attention_reference import dense_flex, relative_error

HEADS, KV_HEADS, DIM, WINDOW, SLOTS, CHUNK = 4, 2, 16, 6, 5, 3
SIZES = {"window": WINDOW, "slots": SLOTS, "chunk": CHUNK, "reach": 11}
SCALE = DIM**-0.5
ROPE = Rope(100.0 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM), attention_scaling=1.2)


def inputs(tokens: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *shape, generator=generator, dtype=torch.float64)

    tokens_alone = {"q": noise(HEADS, DIM), "k": noise(KV_HEADS, DIM), "v": noise(KV_HEADS, DIM), "shift": noise(HEADS)}
    maps = torch.randn(2, KV_HEADS, DIM, DIM, generator=generator, dtype=torch.float64) * 0.5 * DIM**-0.5
    query = torch.randn(HEADS, DIM, generator=generator, dtype=torch.float64) * DIM**-0.5
    return {**tokens_alone, "key_map": maps[0], "value_map": maps[1], "shift_query": query}


def row(lengths: list[int]) -> tuple[Tensor, Tensor]:
    segments = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])
    return segments[None], torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.fixture(autouse=True)
def flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention has no backward pass on a CPU."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(attention_flex, "_fused_flex", dense_flex)


def plans(
    segments: Tensor,
    positions: Tensor,
    carry: WindowCarry | None,
    sinks: int,
    dtype: torch.dtype,
    sizes: Mapping[str, int],
    backend: Any,
) -> Any:
    """Of the slots, and of what the next step finds of the window."""
    before = None if carry is None else (carry.segment_ids, carry.positions)
    rope = replace(ROPE, inverse_frequencies=ROPE.inverse_frequencies.to(segments.device))
    own = plan_slots(segments, positions, before, rope=rope, sinks=sinks, dtype=dtype, backend=backend, **sizes)
    return own, CarryPlan.build(segments, positions, before, window=sizes["window"], sinks=sinks)


def attended(
    x: dict[str, Tensor],
    lengths: list[int],
    *,
    sinks: int,
    cuts: tuple[int, ...] = (),
    sizes: Mapping[str, int] = SIZES,
    backend: str = "sdpa",
) -> tuple[Tensor, Slots]:
    """The output of a row of documents in steps that end at `cuts`, and the slots after it, on the device of `x`; read
    through maps where `x` has them."""
    segments, positions = (part.to(x["k"].device) for part in row(lengths))
    carry: WindowCarry | None = None
    maps = SlotMaps(x["key_map"], x["value_map"], x["shift_query"]) if "key_map" in x else None
    importance = Importance(x["importance_key"], x["importance_value"]) if "importance_key" in x else None
    slots = Slots.empty(1, KV_HEADS, sizes["slots"], DIM, x["k"])
    outs = []
    for start, end in zip((0, *cuts), (*cuts, segments.shape[1]), strict=True):
        q, k, v, shift = (x[name][:, start:end] for name in ("q", "k", "v", "shift"))
        part = (segments[:, start:end], positions[:, start:end])
        own, kept = plans(*part, carry, sinks, q.dtype, sizes, backend)
        found = slots_by_chunk(k, v, own, carry, slots, importance)
        outs.append(slot_attention(q, k, v, own, carry, found, maps, shift, SCALE))
        carry = kept.cut(k, v, carry)
        slots = found.after
    return torch.cat(outs, dim=1), slots


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("lengths", [[40], [4, 30], [20, 1, 19], [9, 31]], ids=str)
@pytest.mark.parametrize("weighed", [False, True])
def test_it_is_the_token_loop(lengths: list[int], sinks: int, backend: str, weighed: bool) -> None:
    x = inputs(sum(lengths))
    if weighed:
        x |= {"importance_key": x["key_map"][:, 0], "importance_value": x["value_map"][:, 0]}
    found, _ = attended(x, lengths, sinks=sinks, backend=backend)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        for head in range(HEADS):
            own = head // (HEADS // KV_HEADS)
            keys, values = x["k"][0, part, own], x["v"][0, part, own]
            logits = torch.zeros(length)
            if weighed:
                logits = DIM**0.5 * keys @ x["importance_key"][own]
                logits = logits + DIM * torch.nn.functional.normalize(values, dim=-1) @ x["importance_value"][own]
            queries = x["q"][0, part, head]
            shift = x["shift"][0, part, head] + queries @ x["shift_query"][head]
            expected, _ = slots_reference.attention(
                queries, keys, values, (logits / 2).exp(), shift,
                x["key_map"][own], x["value_map"][own], start,
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


LARGE = {"window": 150, "slots": 64, "chunk": 48, "reach": 300}
"""Sizes at which a row has several tiles of FlexAttention, whose ends lie within chunks and blocks of slots."""


@pytest.mark.parametrize("sizes", [LARGE, {**LARGE, "slots": 128, "chunk": 128}], ids=["ragged", "whole"])
@pytest.mark.parametrize("lengths", [[624], [200, 3, 421]], ids=str)
def test_what_flex_attention_sees_is_what_sdpa_sees(lengths: list[int], sizes: dict[str, int]) -> None:
    x = {name: value.requires_grad_() for name, value in inputs(624).items()}
    probe = inputs(624, seed=1)["q"]
    for cuts in ((), (4 * sizes["chunk"],)):
        outs = [attended(x, lengths, sinks=2, cuts=cuts, sizes=sizes, backend=name)[0] for name in ("sdpa", "flex")]
        gradients = [torch.autograd.grad((out * probe).sum(), list(x.values())) for out in outs]
        assert relative_error(outs[1], outs[0]) < 1e-12
        for other, one in zip(*gradients, strict=True):
            assert relative_error(one, other) < 1e-11


def test_a_mask_of_blocks_has_no_tile_that_no_query_sees() -> None:
    mask = own_block_mask((512, 128), (4 * 256, 256), torch.device("cpu"))
    assert mask.full_kv_num_blocks.tolist() == [[[2, 2, 2, 2]]] and mask.kv_num_blocks.tolist() == [[[0, 0, 0, 0]]]
    assert mask.full_kv_indices[0, 0, :, :2].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    # Chunks of half a tile: each tile of queries sees the slots of two, half of them by half of its queries.
    mask = own_block_mask((256, 64), (4 * 128, 128), torch.device("cpu"))
    assert mask.full_kv_num_blocks.tolist() == [[[0, 0]]] and mask.kv_num_blocks.tolist() == [[[2, 2]]]


def test_equal_keys_in_one_slot_are_full_attention_to_each() -> None:
    """Where merging loses nothing: the keys behind the window are as many kinds as there are slots, without RoPE."""
    tokens, still = 48, Rope(torch.zeros(DIM // 2, dtype=torch.float64))
    x = inputs(tokens)
    kinds = torch.arange(tokens) % 2
    x["k"], x["v"] = x["k"][:, kinds], x["v"][:, kinds]
    segments, positions = row([tokens])
    plan = plan_slots(segments, positions, None, rope=still, sinks=0, dtype=torch.float64, backend="sdpa", **SIZES)
    found = slots_by_chunk(x["k"], x["v"], plan, None, Slots.empty(1, KV_HEADS, SLOTS, DIM, x["k"]))
    out = slot_attention(x["q"], x["k"], x["v"], plan, None, found, None, torch.zeros_like(x["shift"]), SCALE)
    q, k, v = (value.transpose(1, 2) for value in (x["q"], x["k"], x["v"]))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-10, atol=1e-10)


def errors(
    dtype: torch.dtype,
    lengths: list[int],
    cuts: tuple[int, ...] = (),
    device: str = "cpu",
    backend: str = "sdpa",
    sizes: Mapping[str, int] = SIZES,
) -> list[float]:
    """Of the output and of every gradient, relative to float64 on the CPU."""
    # Slots are chosen by distances: those of the same values.
    rounded = {name: value.to(dtype) for name, value in inputs(sum(lengths)).items()}
    exact = {name: value.double().requires_grad_() for name, value in rounded.items()}
    rough = {name: value.to(device).requires_grad_() for name, value in rounded.items()}
    coefficients = inputs(sum(lengths), seed=1)["q"]
    outs = []
    for x, name in ((exact, "sdpa"), (rough, "flex" if device == "cuda" else backend)):
        out, _ = attended(x, lengths, sinks=2, cuts=cuts, sizes=sizes, backend=name)
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


@pytest.mark.skipif(not native.load("cpu"), reason=str(native.why_not("cpu")))
@pytest.mark.parametrize("cuts", [(), (4 * LARGE["chunk"],)], ids=str)
@pytest.mark.parametrize("lengths", [[610], [200, 3, 407]], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_the_native_kernel_sees_is_what_sdpa_sees(
    dtype: torch.dtype, lengths: list[int], cuts: tuple[int, ...]
) -> None:
    assert takes(torch.device("cpu"), dtype, DIM)
    assert max(errors(dtype, lengths, cuts, backend="native", sizes=LARGE)) < LIMITS[dtype]


def test_fewer_slots_than_tokens_of_a_chunk_are_refused() -> None:
    segments, positions = row([8])
    with pytest.raises(ValueError, match="2 slots cannot take a chunk of 3 tokens"):
        plan_slots(
            segments, positions, None,
            rope=ROPE, window=4, sinks=0, slots=2, chunk=3, reach=4, dtype=torch.float32, backend="sdpa",
        )  # fmt: skip
