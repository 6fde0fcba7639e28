"""The native kernel of attention to a window and slots, against the PyTorch path in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ops import attention_slots_native, native
from pipeline.ops.attention_slots_native import TOLERANCE, NativeSlots, Sizes, results, slot_attention, takes
from pipeline.ops.slots import SlotKeys, SlotMaps
from tests.ops.instruction_sets import ISAS

pytestmark = pytest.mark.skipif(not native.load("cpu"), reason=str(native.why_not("cpu")))


@pytest.fixture(autouse=True)
def registered() -> None:
    for dtype in TOLERANCE:
        assert attention_slots_native.why_not(dtype) is None


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_is_the_path_in_pytorch(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNEMOS_CPU_ISA", isa)
    try:
        torch.ops.mnemos.cpu_isa()
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    for dim in (16, 48, 64, 128):
        for name, (found, expected) in results(dtype, Sizes(dim=dim), seed=0).items():
            assert (found - expected).norm() < TOLERANCE[dtype] * expected.norm(), name


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    tokens, window = draw(st.integers(1, 180)), draw(st.integers(0, 90))
    ends = st.integers(0, window + tokens)
    return Sizes(
        batch=2,
        tokens=tokens,
        window=window,
        chunk=draw(st.integers(1, 130)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from((16, 32, 80))),
        slots=draw(st.integers(1, 70)),
        sinks=draw(st.integers(0, 4)),
        ends=(draw(ends), draw(ends)),
        carried=draw(st.booleans()),
        mapped=draw(st.booleans()),
    )


@settings(max_examples=40)
@given(sizes(), st.integers(0, 1000))
def test_all_sizes_are_the_path_in_pytorch(shape: Sizes, seed: int) -> None:
    for dtype, limit in TOLERANCE.items():
        for name, (found, expected) in results(dtype, shape, seed).items():
            size = max(float(expected.norm()), rounding(shape).get(name, 0))
            assert (found - expected).norm() <= 2 * limit * size, name


def rounding(shape: Sizes) -> dict[str, float]:
    """Of gradients whose terms cancel: they leave the rounding of products of rows of `dim` normal numbers, for each
    token and head, and that times queries, and keys."""
    one = 0.5 * (shape.dim * shape.batch * shape.tokens * shape.kv_heads * shape.group) ** 0.5
    return {"shift": one, "shift_query": one * shape.dim**0.5, "key_map": 0.5 * one * shape.dim**0.5}


def arguments() -> tuple:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).requires_grad_()

    rng, chunk, chunks = torch.Generator().manual_seed(0), 8, 3
    seen = (
        normal(1, chunks, 1, 8, 16).detach(),
        normal(1, chunks, 1, 8, 16).detach(),
        torch.ones(1, chunks, 1, 8),
        torch.ones(1, chunks, 1, 8),
    )
    shift = normal(1, 20, 2).detach().float().requires_grad_()
    sinks = (normal(1, chunks, 1, 1, 16), normal(1, chunks, 1, 1, 16), torch.ones(1, chunks, 1, dtype=torch.bool))
    documents = torch.zeros(1, 20, dtype=torch.int64)
    tokens = (normal(1, 20, 2, 16), normal(1, 20, 1, 16), normal(1, 20, 1, 16))
    turns, places = (torch.ones(2, 1, count, 8) for count in (20, chunks))
    return (
        *tokens,
        documents,
        *seen,
        normal(1, 16, 16),
        normal(1, 16, 16),
        normal(2, 16),
        shift,
        *sinks,
        turns,
        places,
        torch.ones(2, 5, 8),
        4,
        chunk,
        0.25,
    )


def test_torch_knows_its_shapes_and_its_gradients() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    with_maps = arguments()
    for given_to in (with_maps, (*with_maps[:8], None, None, None, *with_maps[11:])):
        torch.library.opcheck(torch.ops.mnemos.slot_attention.default, given_to, test_utils=checks)
        out, slot_out, lse = torch.ops.mnemos.slot_attention(*given_to)
        saved = [x.detach() if isinstance(x, torch.Tensor) else x for x in given_to]
        torch.library.opcheck(
            torch.ops.mnemos.slot_attention_backward.default,
            (torch.ones_like(out), *saved[:18], out.detach(), slot_out.detach(), lse, *saved[18:]),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_a_second_derivative_is_refused() -> None:
    inputs = arguments()
    out, *_ = torch.ops.mnemos.slot_attention(*inputs)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_threads_change_nothing() -> None:
    """Of float32 sums, whose order would show, of chunks whose bands overlap with those of three others."""
    before, found = torch.get_num_threads(), []
    shape = Sizes(tokens=1500, window=200, chunk=64, kv_heads=3, dim=32)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append({name: pair[0] for name, pair in results(torch.float32, shape, seed=0).items()})
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, other[name]) for name, x in found[0].items())


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(1, 20, 2, 12), "dim must be a multiple of 16"),
        (0, torch.zeros(1, 30, 2, 16), "k must have q's tokens at its end"),
        (2, torch.zeros(1, 20, 1, 16, dtype=torch.float64), "v has an unexpected dtype"),
        (3, torch.zeros(1, 19, dtype=torch.int64), "documents has an unexpected shape"),
        (9, None, "key_map, value_map and shift_query come together"),
        (9, torch.zeros(2, 16, 16), "value_map has an unexpected shape"),
        (10, torch.zeros(2, 16, dtype=torch.bfloat16), "shift_query has an unexpected dtype"),
        (19, 0, "chunk at least 1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_fit_is_refused(index: int, wrong: object, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mnemos.slot_attention(*(wrong if i == index else x for i, x in enumerate(arguments())))


def test_it_takes_what_it_has_code_for() -> None:
    cpu = torch.device("cpu")
    assert takes(cpu, torch.float32, 64) and takes(cpu, torch.bfloat16, 16)
    assert not takes(cpu, torch.float64, 64) and not takes(cpu, torch.bfloat16, 24)
    assert not takes(torch.device("cuda"), torch.bfloat16, 64)


def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_checked", {})
    monkeypatch.setattr(attention_slots_native, "self_check", lambda dtype: 0.5)
    attention_slots_native._kernel.cache_clear()
    native.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="the native kernel of slot_attention is not used on cpu"):
        assert not takes(torch.device("cpu"), torch.float32, 64)
    attention_slots_native._kernel.cache_clear()


def test_strided_tensors_are_taken() -> None:
    (
        q,
        k,
        v,
        documents,
        slot_k,
        slot_v,
        counts,
        ages,
        *maps,
        shift,
        sink_k,
        sink_v,
        sinks_seen,
        turns,
        places,
        back,
        window,
        chunk,
        scale,
    ) = arguments()
    plan = NativeSlots(window, chunk, documents, sinks_seen, turns, places, back)
    seen = SlotKeys(slot_k, slot_v, counts, shift, sink_k, sink_v)
    strided = torch.stack([q, q], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    found, expected = (slot_attention(x, k, v, plan, None, seen, ages, SlotMaps(*maps), scale) for x in (strided, q))
    assert torch.equal(found, expected)


def test_a_dtype_apart_is_refused() -> None:
    q, k, v, documents, slot_k, slot_v, counts, ages, _, _, _, shift, sink_k, sink_v, *layout, scale = arguments()
    sinks_seen, turns, places, back, window, chunk = layout
    plan = NativeSlots(window, chunk, documents, sinks_seen, turns, places, back)
    seen = SlotKeys(slot_k, slot_v, counts, shift, sink_k, sink_v)
    with pytest.raises(ValueError, match=r"q is torch\.float32: k, v, slots and sinks have to be of its dtype"):
        slot_attention(q, k, v.bfloat16(), plan, None, seen, ages, None, scale)
