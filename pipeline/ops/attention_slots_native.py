"""Attention to a window and slots on the native kernel of kernels/slot_attention: what it takes, and its check.

A chunk's keys are packed and turned by RoPE in the cache, so that no copies of them reach memory. What no query sees is
not computed. Logits live in the caches alone, forward and backward.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.ops import attention_slots_sdpa, native
from pipeline.ops.attention_sinks import NO_TOKEN, PADDING
from pipeline.ops.attention_slots_sdpa import DenseSlots
from pipeline.ops.checks import dtype_name
from pipeline.ops.rope import Rope, Rotation, one_after_another, turn
from pipeline.ops.slots import SlotKeys, SlotMaps

OP = "slot_attention"
DIM_MULTIPLE = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True, eq=False)
class NativeSlots:
    """What the queries of one step see."""

    window: int
    chunk: int
    documents: Tensor
    """[batch, tokens] int64, with the carried window's before them where there is one."""
    sinks_seen: Tensor
    """[batch, chunks, sinks] bool: by the queries of the document of the chunk's first token."""
    turns: Tensor
    """Cosines and sines of the tokens of `documents`, [2, batch, tokens, dim / 2] float32."""
    places: Tensor
    """The same of the places from which slots turn back by their ages, [2, batch, chunks, dim / 2]."""
    back: Tensor
    """By age, [2, reach + 1, dim / 2]."""

    @classmethod
    def build(
        cls,
        window: int,
        chunk: int,
        documents: Tensor,
        sinks_seen: Tensor,
        turns: Rotation,
        places: Rotation,
        back: Rotation,
    ) -> NativeSlots:
        """With rotations as `SlotPlan` has them; `turns` of all tokens of `documents`."""
        by_token, by_chunk = (torch.stack([x.float().flatten(2) for x in rotation]) for rotation in (turns, places))
        by_age = torch.stack([x.float() for x in back])
        return cls(window, chunk, documents.contiguous(), sinks_seen.contiguous(), by_token, by_chunk, by_age)


def takes(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether the kernel is used for such q, k and v. One that is built but fails its check is not, with a warning."""
    return device.type == "cpu" and dtype in TOLERANCE and dim > 0 and dim % DIM_MULTIPLE == 0 and fits(dtype)


@torch.compiler.assume_constant_result
def fits(dtype: torch.dtype) -> bool:
    """Whether it is built, and passes its check at first use."""
    return native.fits(_kernel(dtype))


@torch.compiler.assume_constant_result
def why_not(dtype: torch.dtype) -> str | None:
    """None where the kernel can be used. Loads the library and checks the kernel against PyTorch, each once."""
    return native.refusal(_kernel(dtype))


@functools.cache
def _kernel(dtype: torch.dtype) -> native.Kernel:
    return native.Kernel(OP, "cpu", dtype_name(dtype), _register, lambda: self_check(dtype), TOLERANCE[dtype])


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: NativeSlots,
    earlier: tuple[Tensor, Tensor] | None,
    seen: SlotKeys,
    ages: Tensor,
    maps: SlotMaps | None,
    scale: float,
) -> Tensor:
    """Shapes as in `attention_slots.slot_attention`; all but the sinks' keys before RoPE, `earlier` too, the keys and
    values of the window before the step. Keys and values of slots are as they are stored, and constants."""
    if earlier is not None:
        k, v = (torch.cat(pair, dim=1) for pair in zip(earlier, (k, v), strict=True))
    if {x.dtype for x in (k, v, seen.keys, seen.values, seen.sink_k, seen.sink_v)} != {q.dtype}:
        raise ValueError(f"q is {q.dtype}: k, v, slots and sinks have to be of its dtype")
    out, *_ = torch.ops.mnemos.slot_attention(
        q.contiguous(), k.contiguous(), v.contiguous(), layout.documents, seen.keys.contiguous(),
        seen.values.contiguous(), seen.counts.float().contiguous(), ages.float().contiguous(),
        *_prepared(maps, k.dtype), seen.shift.float().contiguous(), seen.sink_k.contiguous(), seen.sink_v.contiguous(),
        layout.sinks_seen, layout.turns, layout.places, layout.back, layout.window, layout.chunk, scale,
    )  # fmt: skip
    found: Tensor = out
    return found


def _prepared(maps: SlotMaps | None, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """The op's key_map, value_map and shift_query."""
    if maps is None:
        return None, None, None
    return maps.keys.to(dtype).contiguous(), maps.values.to(dtype).contiguous(), maps.query.float().contiguous()


@functools.cache
def _register() -> None:
    torch.library.register_fake(f"mnemos::{OP}", _fake)
    torch.library.register_fake(f"mnemos::{OP}_backward", _fake_backward)
    torch.library.register_autograd(f"mnemos::{OP}", _backward, setup_context=_setup)
    torch.library.register_autograd(f"mnemos::{OP}_backward", _backward_twice)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, slot_k: Tensor, slot_v: Tensor, counts: Tensor, ages: Tensor,
    key_map: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    rows = 0 if key_map is None else q.shape[0]
    return torch.empty_like(q), q.new_empty((rows, *q.shape[1:])), lse


def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor, slot_k: Tensor, slot_v: Tensor,
    counts: Tensor, ages: Tensor, key_map: Tensor | None, value_map: Tensor | None, shift_query: Tensor | None,
    shift: Tensor, sink_k: Tensor, sink_v: Tensor, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    sums = (torch.empty_like(x, dtype=torch.float32) for x in (k, v))
    batch, chunks, kv_heads, dim = (slot_k.shape[index] for index in (0, 1, 2, 4))
    rows = batch if key_map is not None else 0
    shapes = ((kv_heads, dim, dim), (kv_heads, dim, dim), (q.shape[2], dim))
    maps = (q.new_empty((rows, chunks, *shape), dtype=torch.float32) for shape in shapes)
    return torch.empty_like(q), *sums, *maps, *(torch.empty_like(x) for x in (shift, sink_k, sink_v))


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:18], *output)
    ctx.sizes = inputs[18:]


def _backward(ctx: Any, grad_out: Tensor, *_: Tensor | None) -> tuple:
    k, v, *maps = (ctx.saved_tensors[index] for index in (1, 2, 8, 9, 10))
    grad_q, grad_k, grad_v, *others = torch.ops.mnemos.slot_attention_backward(
        grad_out.contiguous(), *ctx.saved_tensors, *ctx.sizes
    )
    by_map = (
        None if one is None else by_chunk.sum((0, 1)).to(one.dtype)
        for one, by_chunk in zip(maps, others[:3], strict=True)
    )  # fmt: skip
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), *[None] * 5, *by_map, *others[3:], *[None] * 7


def _backward_twice(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("slot_attention is differentiable once; its backward pass has no gradient")


class Sizes(NamedTuple):
    """Of the inputs of a check: by default what fills no tile, and needs more than one register tile in width."""

    batch: int = 2
    tokens: int = 150
    window: int = 40
    chunk: int = 32
    kv_heads: int = 2
    group: int = 2
    dim: int = 80
    slots: int = 33
    sinks: int = 3
    ends: tuple[int, ...] = (70, 33)
    """Where a row's first document ends, counted from the carried window's first token."""
    carried: bool = True
    """Whether there is a carried window."""
    mapped: bool = True
    """Whether slots are read through maps."""


def self_check(dtype: torch.dtype) -> float:
    """The largest relative RMSE of a result, gradients included, against the PyTorch path in float64: two rows of two
    documents behind a carried window, chunks whose bands overlap, and a last one that is not whole."""
    errors = [float((x - y).norm() / y.norm()) for x, y in results(dtype, Sizes(), 0).values()]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def results(dtype: torch.dtype, sizes: Sizes, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The output and all gradients of inputs drawn from a seed, by the kernel and by the PyTorch path in float64, by
    name."""
    rng = torch.Generator("cpu").manual_seed(seed)
    batch, tokens, window, chunk, kv_heads, group, dim, slots, sinks, ends, carried, mapped = sizes
    chunks, heads = -(-tokens // chunk), kv_heads * group

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64, device="cpu").to(dtype)

    ids = torch.ones(batch, window + chunks * chunk, dtype=torch.int64, device="cpu")
    for row, end in zip(ids, ends, strict=False):
        row[end:] = 2
    ids[:, window + tokens :] = PADDING
    if not carried:
        ids[:, :window] = NO_TOKEN
    by_chunk = ids[:, window:].unflatten(1, (chunks, chunk))
    own = by_chunk == by_chunk[..., :1]
    sinks_seen = torch.rand(batch, chunks, sinks, generator=rng, device="cpu") < 0.5
    counts = torch.randint(0, 9, (batch, chunks, kv_heads, slots), generator=rng, device="cpu")
    rope = Rope(100.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim), attention_scaling=1.2)
    turns = rope.rotation(torch.arange(window + tokens, device="cpu").expand(batch, -1))
    old_turns, own_turns = (Rotation(*(x[:, part] for x in turns)) for part in (slice(window), slice(window, None)))
    places = rope.rotation(torch.arange(0, tokens, chunk, device="cpu").expand(batch, -1)[..., None])
    back = rope.back(50, ids.device)
    ages = torch.randint(0, 70, counts.shape, generator=rng, device="cpu")
    known = slice(0 if carried else window, window + tokens)
    plain = NativeSlots.build(window, chunk, ids[:, known], sinks_seen, turns if carried else own_turns, places, back)
    visible = own[..., None] & sinks_seen[:, :, None]
    dense = DenseSlots.build(by_chunk, ids, own, visible, slots=slots, dtype=torch.float64)
    inputs = {
        "q": normal(batch, tokens, heads, dim),
        "k": normal(batch, tokens, kv_heads, dim),
        "v": normal(batch, tokens, kv_heads, dim),
        "shift": normal(batch, tokens, heads).float(),
        "sink_k": normal(batch, chunks, sinks, kv_heads, dim),
        "sink_v": normal(batch, chunks, sinks, kv_heads, dim),
    }
    if carried:
        inputs |= {name: normal(batch, window, kv_heads, dim) for name in ("old_k", "old_v")}
    if mapped:
        maps = {name: normal(kv_heads, dim, dim).double() * dim**-0.5 for name in ("key_map", "value_map")}
        maps["shift_query"] = normal(heads, dim).double() * dim**-0.5
        inputs |= {name: change.to(dtype) for name, change in maps.items()}
    stored = [normal(batch, chunks, kv_heads, slots, dim) for _ in range(2)]
    probe = normal(batch, tokens, heads, dim)

    def run(precise: bool) -> dict[str, Tensor]:
        x = {name: (one.double() if precise else one).detach().clone().requires_grad_() for name, one in inputs.items()}
        own_maps = SlotMaps(x["key_map"], x["value_map"], x["shift_query"]) if mapped else None
        slot_k, slot_v = (one.to(x["q"].dtype) for one in stored)
        seen = SlotKeys(slot_k, slot_v, counts.to(x["shift"].dtype), x["shift"], x["sink_k"], x["sink_v"])
        earlier = (x["old_k"], x["old_v"]) if carried else None
        with torch.enable_grad():
            if precise:
                if own_maps is not None:
                    slot_k, slot_v = own_maps.read(slot_k, slot_v)
                    seen = seen._replace(shift=own_maps.shifted(x["shift"], x["q"]))
                by_age = one_after_another(places, Rotation(*(one[ages.clamp_max(50)] for one in back)))
                seen = seen._replace(keys=turn(slot_k, *by_age), values=slot_v)
                turned = turn(x["q"], *own_turns), turn(x["k"], *own_turns)
                if earlier is not None:
                    earlier = turn(earlier[0], *old_turns), earlier[1]
                out = attention_slots_sdpa.slot_attention(*turned, x["v"], dense, earlier, seen, dim**-0.5)
            else:
                out = slot_attention(x["q"], x["k"], x["v"], plain, earlier, seen, ages, own_maps, dim**-0.5)
        gradients = torch.autograd.grad(out, list(x.values()), probe.to(out.dtype))
        return {"out": out.detach().double(), **{name: one.double() for name, one in zip(x, gradients, strict=True)}}

    found, expected = run(False), run(True)
    return {name: (found[name], expected[name]) for name in found}
