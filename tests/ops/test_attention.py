"""Attention against its definition, in float64 on a CPU; the GPU backends through stand-ins for their kernels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.ops import attention_flash, attention_flex
from pipeline.ops.attention import (
    Rope,
    choose_attention,
    empty_carry,
    full_attention,
    plan_full_attention,
    plan_window_attention,
    window_attention,
)
from pipeline.ops.attention_bands import block_length
from pipeline.ops.attention_flex import block_mask
from pipeline.ops.rope import rotate
from tests.ops.attention_reference import dense_flex, pack, reference_attention, relative_error

DOUBLE = torch.float64
TOLERANCE = 1e-10


def rope_of(dim: int) -> Rope:
    return Rope(10000.0 ** -(torch.arange(0, dim, 2, dtype=DOUBLE) / dim))


def tensors(batch: int, tokens: int, heads: int, kv_heads: int, dim: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, tokens, n, dim) for n in (heads, kv_heads, kv_heads))
    return [torch.randn(shape, generator=generator, dtype=DOUBLE).requires_grad_() for shape in shapes]


def windowed(q, k, v, ids, positions, window, sinks, carry=None, backend="sdpa"):
    plan = plan_window_attention(
        ids,
        positions,
        rope=rope_of(q.shape[-1]),
        window=window,
        sinks=sinks,
        carry=carry,
        backend=backend,
        dtype=q.dtype,
    )
    return window_attention(q, k, v, plan, carry)


def full(q, k, v, ids, positions, backend="sdpa"):
    plan = plan_full_attention(ids, positions, rope=rope_of(q.shape[-1]), backend=backend, dtype=q.dtype)
    return full_attention(q, k, v, plan)


def in_steps(q, k, v, ids, positions, window, sinks, cuts, backend="sdpa"):
    """The stream in steps that end at `cuts`, carrying."""
    carry, outs = None, []
    for begin, end in zip([0, *cuts], [*cuts, q.shape[1]], strict=True):
        at = slice(begin, end)
        out, carry = windowed(q[:, at], k[:, at], v[:, at], ids[:, at], positions[:, at], window, sinks, carry, backend)
        outs.append(out)
    return torch.cat(outs, 1)


def assert_same(out, inputs, want):
    """Equal outputs and equal gradients of a random projection."""
    assert relative_error(out, want) <= TOLERANCE
    probe = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    have, wanted = (torch.autograd.grad(x, inputs, probe, retain_graph=True) for x in (out, want))
    for a, b in zip(have, wanted, strict=True):
        assert relative_error(a, b) <= TOLERANCE


@st.composite
def layouts(draw, max_tokens=30):
    """Rows of documents, and the sizes of everything."""
    tokens, batch = draw(st.integers(1, max_tokens)), draw(st.integers(1, 2))
    rows = []
    for _ in range(batch):
        row = []
        while (left := tokens - sum(row)) > 0:
            row.append(draw(st.integers(1, left)))
        rows.append(row)
    kv_heads, group, dim = draw(st.sampled_from([(1, 1, 2), (1, 2, 4), (2, 1, 8), (2, 3, 4)]))
    return rows, kv_heads * group, kv_heads, dim, draw(st.integers(1, 9)), draw(st.integers(0, 4))


CASES = settings(max_examples=60, deadline=None, derandomize=True)


@given(layouts())
@CASES
def test_window_equals_its_definition(layout):
    rows, heads, kv_heads, dim, window, sinks = layout
    ids, positions = pack(rows)
    q, k, v = tensors(*ids.shape, heads, kv_heads, dim)
    out, _ = windowed(q, k, v, ids, positions, window, sinks)
    want = reference_attention(q, k, v, ids, positions, rope_of(dim).inverse_frequencies, window, sinks)
    assert_same(out, (q, k, v), want)


@given(layouts())
@settings(CASES, max_examples=30)
def test_full_equals_its_definition(layout):
    rows, heads, kv_heads, dim, _, _ = layout
    ids, positions = pack(rows)
    q, k, v = tensors(*ids.shape, heads, kv_heads, dim)
    want = reference_attention(q, k, v, ids, positions, rope_of(dim).inverse_frequencies)
    assert_same(full(q, k, v, ids, positions), (q, k, v), want)


@given(layouts(), st.data())
@CASES
def test_steps_with_a_carry_equal_one_run(layout, data):
    rows, heads, kv_heads, dim, window, sinks = layout
    ids, positions = pack(rows)
    tokens = ids.shape[1]
    cuts = sorted(data.draw(st.sets(st.integers(1, max(tokens - 1, 1)), max_size=5))) if tokens > 1 else []
    q, k, v = (x.detach() for x in tensors(*ids.shape, heads, kv_heads, dim))
    want, _ = windowed(q, k, v, ids, positions, window, sinks)
    assert relative_error(in_steps(q, k, v, ids, positions, window, sinks, cuts), want) <= TOLERANCE


@pytest.mark.parametrize("cuts", [[1, 2, 3], [2, 20], [5, 7, 9, 40], list(range(1, 48)), [13, 15, 16, 30]])
def test_a_document_over_many_steps(cuts):
    # Documents of 14 and 34 tokens: [.., 15, 16, ..] cuts inside the second one's sinks, [1, 2, 3] inside the first's.
    ids, positions = pack([[14, 34], [48]])
    q, k, v = (x.detach() for x in tensors(2, 48, 4, 2, 8))
    want = reference_attention(q, k, v, ids, positions, rope_of(8).inverse_frequencies, 6, 4)
    assert relative_error(in_steps(q, k, v, ids, positions, 6, 4, cuts), want) <= TOLERANCE


def test_gradients_of_a_step_with_a_carry():
    ids, positions = pack([[5, 19], [24]])
    q, k, v = tensors(2, 24, 4, 2, 8)
    fixed = [x[:, :9].detach() for x in (q, k, v)]
    _, carry = windowed(*fixed, ids[:, :9], positions[:, :9], 4, 3)
    assert not carry.k.requires_grad
    out, _ = windowed(q[:, 9:], k[:, 9:], v[:, 9:], ids[:, 9:], positions[:, 9:], 4, 3, carry)
    joined = [torch.cat((past, x[:, 9:]), 1) for past, x in zip(fixed, (q, k, v), strict=True)]
    want = reference_attention(*joined, ids, positions, rope_of(8).inverse_frequencies, 4, 3)[:, 9:]
    assert_same(out, (q, k, v), want)


def test_a_stream_may_start_in_the_middle_of_a_document():
    # Its sinks are unknown then: positions say how far it is, nothing stands for the missing tokens.
    ids, positions = torch.zeros(1, 20, dtype=torch.int64), torch.arange(50, 70)[None]
    q, k, v = tensors(1, 20, 2, 1, 4)
    want = reference_attention(q, k, v, ids, positions, rope_of(4).inverse_frequencies, 5, 3)
    assert_same(windowed(q, k, v, ids, positions, 5, 3)[0], (q, k, v), want)
    carry = empty_carry(1, 5, 3, 1, 4, DOUBLE, "cpu")
    assert_same(windowed(q, k, v, ids, positions, 5, 3, carry)[0], (q, k, v), want)


def test_an_empty_carry_is_no_carry():
    ids, positions = pack([[3, 12]])
    q, k, v = tensors(1, 15, 2, 2, 4)
    out, after = windowed(q, k, v, ids, positions, 4, 2)
    out_empty, after_empty = windowed(q, k, v, ids, positions, 4, 2, empty_carry(1, 4, 2, 2, 4, DOUBLE, "cpu"))
    assert_same(out_empty, (q, k, v), out)
    for a, b in zip(after, after_empty, strict=True):
        assert torch.equal(a, b)


def test_the_carry_is_right_aligned_and_holds_what_has_come():
    ids, positions = pack([[3, 2]])
    q, k, v = tensors(1, 5, 1, 1, 2)
    _, carry = windowed(q, k, v, ids, positions, 7, 3)
    assert carry.segment_ids.tolist() == [[-1, -1, 0, 0, 0, 1, 1]]
    assert carry.positions.tolist() == [[0, 0, 0, 1, 2, 0, 1]]
    assert torch.equal(carry.k[:, 2:], k) and not carry.k[:, :2].any()
    assert torch.equal(carry.sink_k[:, :2], k[:, 3:]) and not carry.sink_k[:, 2:].any()


@pytest.mark.parametrize("mode", ["window", "full"])
def test_packed_documents_equal_the_same_documents_apart(mode):
    lengths = [3, 17, 1, 24, 6]
    ids, positions = pack([lengths])
    q, k, v = tensors(1, sum(lengths), 4, 2, 8)

    def attend(q, k, v, ids, positions):
        if mode == "full":
            return full(q, k, v, ids, positions)
        return windowed(q, k, v, ids, positions, 5, 3)[0]

    parts = [x.split(lengths, 1) for x in (q, k, v)]
    alone = [attend(*part, *pack([[n]])) for *part, n in zip(*parts, lengths, strict=True)]
    assert_same(attend(q, k, v, ids, positions), (q, k, v), torch.cat(alone, 1))


@pytest.mark.parametrize("mode", ["window", "full"])
def test_the_future_and_other_documents_change_nothing(mode):
    ids, positions = pack([[9, 20, 11]])
    q, k, v = (x.detach() for x in tensors(1, 40, 2, 2, 4))

    def attend(k, v):
        return full(q, k, v, ids, positions) if mode == "full" else windowed(q, k, v, ids, positions, 6, 4)[0]

    before = attend(k, v)
    for changed, same in ((slice(20, 40), slice(0, 20)), (slice(0, 9), slice(9, 40)), (slice(9, 29), slice(29, 40))):
        k2, v2 = k.clone(), v.clone()
        k2[:, changed] += 3.0
        v2[:, changed] -= 5.0
        assert (attend(k2, v2)[:, same] - before[:, same]).abs().max() <= 1e-12


def test_a_wide_window_is_full_attention():
    ids, positions = pack([[37]])
    q, k, v = tensors(1, 37, 4, 2, 8)
    assert_same(windowed(q, k, v, ids, positions, 64, 4)[0], (q, k, v), full(q, k, v, ids, positions))


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("mode", ["window", "full"])
def test_nothing_is_as_large_as_tokens_squared(mode):
    tokens = 1024
    ids, positions = pack([[tokens]])
    q, k, v = tensors(1, tokens, 2, 1, 8)
    with LargestTensor() as largest:
        if mode == "full":
            out = full(q, k, v, ids, positions)
        else:
            out, _ = windowed(q, k, v, ids, positions, 32, 4, empty_carry(1, 32, 4, 1, 8, DOUBLE, "cpu"))
        out.sum().backward()
    assert largest.numel <= tokens * 32 * 3 < tokens**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(dtype):
    ids, positions = pack([[70, 58]])
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors(1, 128, 4, 2, 16))
    exact = [x.detach().to(DOUBLE).requires_grad_() for x in (q, k, v)]
    out, carry = windowed(q, k, v, ids, positions, 16, 4)
    want, _ = windowed(*exact, ids, positions, 16, 4)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert out.dtype == carry.k.dtype == dtype
    assert relative_error(out, want) < tolerance
    probe = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), probe.to(dtype)), torch.autograd.grad(want, exact, probe), strict=True
    ):
        assert relative_error(a, b) < 2 * tolerance


def test_rope_is_that_of_transformers_and_exact_far_out():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    rope = Rope(1 / 10000.0 ** (torch.arange(0, 8, 2) / 8), attention_scaling=1.3)
    positions, x = torch.arange(20)[None], torch.randn(1, 20, 3, 8)
    angles = positions[..., None] * rope.inverse_frequencies
    cos, sin = (1.3 * f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
    want, _ = llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    assert relative_error(rotate(x, rope.rotation(positions)), want) < 1e-6
    far = rope.rotation(torch.tensor([3_000_000])).cos[0, 0, 0]
    assert float(far) == pytest.approx(1.3 * math.cos(3_000_000), abs=1e-6)


# ---- the GPU backends' plans, with dense stand-ins for the kernels


def dense_varlen(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size=(-1, -1)
):
    """flash_attn_varlen_func as documented: causality and windows are aligned to the last key of each sequence."""
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    assert cu_seqlens_q[-1] == q.shape[0] and cu_seqlens_k[-1] == k.shape[0] == v.shape[0]
    group, outs = q.shape[1] // k.shape[1], []
    bounds = zip(
        cu_seqlens_q[:-1].tolist(),
        cu_seqlens_q[1:].tolist(),
        cu_seqlens_k[:-1].tolist(),
        cu_seqlens_k[1:].tolist(),
        strict=True,
    )
    for q0, q1, k0, k1 in bounds:
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        keys, values = (x[k0:k1].repeat_interleave(group, 1) for x in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * softmax_scale
        weights = torch.softmax(logits.masked_fill(~seen, -math.inf), -1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outs)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(attention_flex, "_fused_flex", dense_flex)
    monkeypatch.setattr(attention_flash, "varlen_function", lambda backend: dense_varlen)


LONG = [[3, 200, 141, 40], [384]]


@pytest.mark.parametrize("backend", ["flex", "flash3"])
@pytest.mark.parametrize("window", [7, 128, 150])
def test_gpu_backends_lay_out_windows(kernels, backend, window):
    sinks = 3 if backend == "flex" else 0
    ids, positions = pack(LONG)
    q, k, v = tensors(2, 384, 4, 2, 8)
    want, carry = windowed(q, k, v, ids, positions, window, sinks)
    out, carry_too = windowed(q, k, v, ids, positions, window, sinks, backend=backend)
    assert_same(out, (q, k, v), want)
    assert all(torch.equal(a, b) for a, b in zip(carry, carry_too, strict=True))
    for cuts in ([2, 5, 203], [130, 131, 260]):
        out = in_steps(q, k, v, ids, positions, window, sinks, cuts, backend)
        assert_same(out, (q,), in_steps(q, k, v, ids, positions, window, sinks, cuts))
        assert relative_error(out, want) <= TOLERANCE


@pytest.mark.parametrize("backend", ["flex", "flash4"])
def test_gpu_backends_lay_out_documents(kernels, backend):
    ids, positions = pack(LONG)
    q, k, v = tensors(2, 384, 4, 2, 8)
    assert_same(full(q, k, v, ids, positions, backend), (q, k, v), full(q, k, v, ids, positions))


@given(layouts(max_tokens=20))
@settings(CASES, max_examples=20)
def test_flex_layout_for_any_documents(layout):
    rows, heads, kv_heads, dim, window, sinks = layout
    ids, positions = pack(rows)
    q, k, v = tensors(*ids.shape, heads, kv_heads, dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_flex, "_fused_flex", dense_flex)
        out, _ = windowed(q, k, v, ids, positions, window, sinks, backend="flex")
    assert_same(out, (q, k, v), windowed(q, k, v, ids, positions, window, sinks)[0])


def test_block_mask_skips_what_no_query_sees():
    ids, _ = pack([[640, 384]])
    mask = block_mask(ids, None, 256)
    # Tiles of 128: a query tile sees its own, the one before and the far edge of the one before that, and no other
    # document; only the one before is seen by all of its queries.
    assert mask.kv_num_blocks[0, 0].tolist() == [1, 1, 2, 2, 2, 1, 1, 2]
    assert mask.full_kv_num_blocks[0, 0].tolist() == [0, 1, 1, 1, 1, 0, 1, 1]


# ---- the choice of a backend, and errors

BF16 = torch.bfloat16


@pytest.fixture
def installed(monkeypatch):
    """Which flash versions seem to be installed; none unless a test adds one."""
    versions = set()
    monkeypatch.setattr(attention_flash, "varlen_function", lambda name: dense_varlen if name in versions else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return versions


def test_auto_choice(installed):
    assert choose_attention("full", 0, "cpu", torch.float32, 64) == "sdpa"
    assert choose_attention("window", 4, "cpu", DOUBLE, 7) == "sdpa"
    assert choose_attention("full", 0, "cuda", BF16, 128) == "flex"
    installed.add("flash2")
    assert choose_attention("full", 0, "cuda", BF16, 128) == "flash2"
    installed.update(("flash3", "flash4"))
    assert choose_attention("full", 0, "cuda", BF16, 128) == "flash4"
    assert choose_attention("full", 0, "cuda", BF16, 192) == "flash3"
    assert choose_attention("full", 0, "cuda", torch.float32, 128) == "flex"
    assert choose_attention("window", 0, "cuda", BF16, 128) == "flash4"
    assert choose_attention("window", 4, "cuda", BF16, 128) == "flex"
    assert choose_attention("window", 4, "cuda", BF16, 128, "flex") == "flex"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("full", 0, "cpu", BF16, 64, "fast"), "'fast' does not exist: use auto, sdpa"),
        (("window", 4, "cpu", BF16, 64, "flex"), "flex runs on cuda, not on cpu: use sdpa"),
        (("window", 4, "cuda", BF16, 64, "sdpa"), "sdpa runs on cpu, not on cuda: use flex"),
        (("window", 4, "cuda", BF16, 64, "flash3"), "flash3 has no differentiable log-sum-exp.*: use flex"),
        (("full", 0, "cuda", torch.float32, 64, "flash2"), "only float16 and bfloat16, not float32: use flex"),
        (("full", 0, "cuda", BF16, 20, "flash2"), "multiple of 8 up to 256, not 20: use flex"),
        (("full", 0, "cuda", BF16, 64, "flash4"), r"not installed \(no flash_attn.cute.flash_attn_varlen_func\): use"),
        (("full", 0, "cuda", DOUBLE, 64, "flex"), "flex has no float64: no other backend can either"),
        (("full", 0, "cuda", BF16, 8), "no attention backend for cuda: flex needs a head dimension of 16 or more"),
        (("full", 0, "mps", BF16, 64), "no attention backend for mps"),
    ],
)
def test_refusals_name_the_mend(installed, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        choose_attention(*arguments)
    assert "\n" not in str(error.value)


def test_flash_refuses_a_gpu_it_has_no_kernel_for(installed, monkeypatch):
    installed.update(("flash3", "flash4"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert choose_attention("full", 0, "cuda", BF16, 128) == "flex"
    with pytest.raises(ValueError, match="compute capability 8: use flex"):
        choose_attention("full", 0, "cuda", BF16, 128, "flash4")


def test_wrong_calls():
    ids, positions = pack([[6]])
    q, k, v = tensors(1, 6, 2, 2, 4)
    settings_ = {"rope": rope_of(4), "backend": "sdpa", "dtype": DOUBLE}
    plan = plan_window_attention(ids, positions, window=3, sinks=1, carry=None, **settings_)
    carry = empty_carry(1, 3, 1, 2, 4, DOUBLE, "cpu")
    with pytest.raises(ValueError, match="both have a carry or both have none"):
        window_attention(q, k, v, plan, carry)
    with pytest.raises(ValueError, match="plan for window attention"):
        full_attention(q, k, v, plan)
    with pytest.raises(ValueError, match=r"with the plan's \(1, 6\)"):
        window_attention(q[:, :5], k[:, :5], v[:, :5], plan, None)
    with pytest.raises(ValueError, match="multiple of key-value heads"):
        window_attention(torch.cat((q, q[:, :, :1]), 2), k, v, plan, None)
    with pytest.raises(ValueError, match="head dimension of 4, q has 2"):
        window_attention(q[..., :2], k[..., :2], v[..., :2], plan, None)
    with pytest.raises(ValueError, match=r"carry is for .*\(1, 3, 1\), this step for \(1, 4, 1\)"):
        plan_window_attention(ids, positions, window=4, sinks=1, carry=carry, **settings_)
    with pytest.raises(ValueError, match="window must be at least 1"):
        plan_window_attention(ids, positions, window=0, sinks=1, carry=None, **settings_)
    with pytest.raises(ValueError, match="with a token"):
        plan_full_attention(ids[:, :0], positions[:, :0], **settings_)
    with pytest.raises(ValueError, match="take it from choose_attention"):
        plan_full_attention(ids, positions, rope=rope_of(4), backend="auto", dtype=DOUBLE)
    with pytest.raises(ValueError, match="flash2 cannot do sinks: use flex"):
        plan_window_attention(
            ids, positions, window=3, sinks=1, carry=None, rope=rope_of(4), backend="flash2", dtype=DOUBLE
        )


@pytest.mark.parametrize(
    "tokens, window, block", [(4096, 256, 128), (4096, 8188, 2048), (4096, 832, 410), (100, 256, 100), (130, 64, 44)]
)
def test_blocks_of_a_band_are_even(tokens: int, window: int, block: int) -> None:
    """4,096 queries of a window of 8,188 in blocks of 4,094 would leave two for a block of their own."""
    found = block_length(tokens, window)
    assert found == block and -(-tokens // found) * found - tokens < -(-tokens // found)
