"""What is stored in slots: nothing is lost but by merging, and the sums stay."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops import native, store_slots_native
from pipeline.ops.slots import Slots, SlotsByChunk, shuffle
from pipeline.ops.store_slots import store_slots
from tests.ops.instruction_sets import ISAS
from tests.ops.slots_reference import Slot, stored

BATCH, HEADS, DIM = 2, 3, 4


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def order(count: int) -> Tensor:
    return torch.tensor(shuffle(count))


def store(slots: Slots, k: Tensor, v: Tensor, taken: Tensor, places: Tensor, weights: Tensor | None = None) -> Slots:
    """Of one chunk: k and v [batch, tokens, heads, dim], weights [batch, tokens, heads]."""
    goes_on = torch.ones(k.shape[0], 1, dtype=torch.bool)
    tokens = (k[:, None], v[:, None], None if weights is None else weights[:, None], taken[:, None])
    return store_slots(slots, *tokens, goes_on, places, backend="torch").after


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


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 7), st.integers(0, 6), st.integers(1, 5), st.integers(0, 99))
def test_what_weighs_more_is_merged_as_the_loop_has_it(tokens: int, more: int, rounds: int, seed: int) -> None:
    slots, total = tokens + more, tokens * rounds
    k, v = (noise(total, DIM, seed=seed + part) for part in (1, 2))
    weights = noise(total, seed=seed + 3).exp()
    found, loop = Slots.empty(1, 1, slots, DIM, k), []
    for start in range(0, total, tokens):
        part = slice(start, start + tokens)
        found = store(
            found, k[None, part, None], v[None, part, None], torch.ones(1, tokens, dtype=torch.bool),
            order(slots + tokens), weights[None, part, None],
        )  # fmt: skip
        new = [Slot(k[j], v[j], 1, j, j - start, float(weights[j])) for j in range(start, start + tokens)]
        loop = stored(loop, new, slots, tokens, start + tokens)
    used = int((found.counts > 0).sum())
    assert used == len(loop)
    for name, wanted in (("counts", [x.count for x in loop]), ("weights", [x.weight for x in loop])):
        torch.testing.assert_close(getattr(found, name)[0, 0, :used], torch.tensor(wanted, dtype=torch.float64))
    torch.testing.assert_close(found.keys[0, 0, :used], torch.stack([x.key for x in loop]), rtol=1e-10, atol=1e-10)


def test_the_key_of_a_heavy_token_is_kept() -> None:
    k = noise(1, 256, HEADS, DIM, seed=5)
    found = Slots.empty(1, HEADS, 64, DIM, k)
    heavy = (torch.arange(256) % 8 == 0)[None, :, None].expand(1, 256, HEADS)
    weights = torch.where(heavy, 30.0, 1.0).double()
    for part in range(0, 256, 8):
        of = slice(part, part + 8)
        taken = torch.ones(1, 8, dtype=torch.bool)
        found = store(found, k[:, of], k[:, of], taken, order(72), weights[:, of])
    lost = torch.cdist(k[0].transpose(0, 1), found.keys[0]).min(2).values
    assert lost[:, ::8].mean() < 0.3 * lost[:, 1::8].mean()
    assert found.counts.sum() == 256 * HEADS


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


def step(
    tokens: int = 8, slots: int = 24, chunks: int = 6, dim: int = 32, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Slots, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments: of two streams, the second of which begins anew in the middle; not every token is taken."""
    size = (BATCH, chunks, tokens, HEADS, dim)
    k, v = (noise(*size, seed=seed + part).to(dtype) for part in (1, 2))
    taken = torch.rand(size[:3], generator=torch.Generator().manual_seed(seed)) < 0.8
    goes_on = torch.ones(size[:2], dtype=torch.bool)
    goes_on[1, chunks // 2] = False
    weights = noise(*size[:4], seed=seed + 3).exp().float()
    return Slots.empty(BATCH, HEADS, slots, dim, k), k, v, weights, taken, goes_on, order(slots + tokens)


def exact(arguments: tuple[Slots, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]) -> SlotsByChunk:
    """By PyTorch in float64."""
    slots, k, v, weights, *rest = arguments
    tokens = (x.double() for x in (k, v, weights))
    return store_slots(Slots(*(x.double() for x in slots)), *tokens, *rest, backend="torch")


def assert_same(found: SlotsByChunk, wanted: SlotsByChunk, rtol: float) -> None:
    for one, other in zip((*found[:4], *found.after), (*wanted[:4], *wanted.after), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=rtol, atol=rtol)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(0, 90), st.integers(1, 5), st.sampled_from([16, 32, 48, 128]),
    st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99),
)  # fmt: skip
def test_the_kernel_is_pytorch_in_float64(
    tokens: int, more: int, chunks: int, dim: int, dtype: torch.dtype, seed: int
) -> None:
    arguments = step(tokens, tokens + more, chunks, dim, dtype, seed)
    found = store_slots(*arguments, backend="cpu")
    assert found.keys.dtype == found.values.dtype == dtype and found.after.keys.dtype == torch.float32
    assert_same(found, exact(arguments), 1e-5 if dtype == torch.float32 else 1e-2)


def test_every_instruction_set_is_pytorch_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.load("cpu")
    widest = torch.ops.mnemos.cpu_isa()
    arguments = step(tokens=40, slots=150, dim=64)
    for isa in ISAS[: ISAS.index(widest) + 1]:
        monkeypatch.setenv("MNEMOS_CPU_ISA", isa)
        assert_same(store_slots(*arguments, backend="cpu"), exact(arguments), 1e-5)


def test_of_equal_keys_the_kernel_loses_nothing() -> None:
    kinds = noise(20, 64, seed=3).float()
    drawn = torch.randint(20, (1, 12, 8, 1), generator=torch.Generator().manual_seed(4))
    keys = kinds[drawn]
    whole = torch.ones(1, 12, 8, dtype=torch.bool)
    arguments = (Slots.empty(1, 1, 40, 64, kinds), keys, keys, None, whole, whole[..., 0], order(48))
    after = store_slots(*arguments, backend="cpu").after
    assert torch.cdist(after.keys[0, 0].double(), kinds.double()).min(1).values.max() < 1e-5
    assert after.counts.sum() == 96


@pytest.mark.parametrize("dtype", store_slots_native.DTYPES, ids=str)
def test_steps_rows_heads_and_threads_change_no_bit_of_the_kernel(dtype: torch.dtype) -> None:
    slots, k, v, weights, taken, goes_on, places = arguments = step(tokens=24, slots=100, dim=64, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole = store_slots(*arguments, backend="cpu")
        shared = []
        # Of six heads of streams two are left over, one, six and six.
        for count in (4, 5, 8, 16):
            torch.set_num_threads(count)
            shared.append(store_slots(*arguments, backend="cpu"))
        torch.set_num_threads(1)
        early, late = ([x[:, part] for x in (k, v, weights, taken, goes_on)] for part in (slice(2), slice(2, None)))
        first = store_slots(slots, *early, places, backend="cpu")
        rest = store_slots(first.after, *late, places, backend="cpu")
        one = store_slots(
            Slots(*(x[1:, 2:] for x in slots)), k[1:, ..., 2:, :], v[1:, ..., 2:, :], weights[1:, ..., 2:],
            taken[1:], goes_on[1:], places, backend="cpu",
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert not any(x.any() for x in slots), "the slots that are given stay as they are"
    for other in shared:
        pairs = zip((*other[:4], *other.after), (*whole[:4], *whole.after), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
    for name in ("keys", "values", "counts", "ages"):
        assert torch.equal(torch.cat([getattr(first, name), getattr(rest, name)], dim=1), getattr(whole, name))
        assert torch.equal(getattr(one, name), getattr(whole, name)[1:, :, 2:])
        assert torch.equal(getattr(rest.after, name), getattr(whole.after, name))


def test_an_instruction_set_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.load("cpu")
    monkeypatch.setenv("MNEMOS_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="MNEMOS_CPU_ISA is sse9"):
        store_slots(*step(), backend="cpu")


def test_a_head_of_no_numbers_stays_alone() -> None:
    arguments = step()
    clean = store_slots(*arguments, backend="cpu")
    arguments[1][0, 1, :, 0] = math.nan
    found = store_slots(*arguments, backend="cpu")
    assert found.after.keys[0, 0].isnan().any()
    for one, other in zip(found.after, clean.after, strict=True):
        assert torch.equal(one[0, 1:], other[0, 1:]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"k": torch.zeros(2, 6, 8, 3, 20), "v": torch.zeros(2, 6, 8, 3, 20)}, "a dim that is a multiple of 16"),
        ({"dtype": torch.float64}, "k is float64"),
    ],
    ids=["dim", "dtype"],
)
def test_the_kernel_asked_for_by_name_refuses_what_it_does_not_take(changed: dict[str, Any], message: str) -> None:
    slots, k, v, weights, *rest = step()
    dtype = changed.pop("dtype", torch.float32)
    k, v, weights = (changed.get(name, x).to(dtype) for name, x in (("k", k), ("v", v), ("weights", weights)))
    rest = [weights, *rest]
    slots = Slots.empty(BATCH, HEADS, 24, k.shape[-1], k)
    with pytest.raises(ValueError, match=message):
        store_slots(slots, k, v, *rest, backend="cpu")
    assert_same(store_slots(slots, k, v, *rest), exact((slots, k, v, *rest)), 1e-5)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("v", torch.zeros(2, 6, 8, 3, 16), r"v has shape \[2, 6, 8, 3, 16\]; expected \[2, 6, 8, 3, 32\]"),
        ("weights", torch.ones(2, 6, 8, 2), r"weights has shape \[2, 6, 8, 2\]; expected \[2, 6, 8, 3\]"),
        ("weights", torch.ones(2, 6, 8, 3).double(), "weights is float64; expected float32"),
        ("taken", torch.ones(2, 6, 8), "taken is float32; expected bool"),
        ("goes_on", torch.ones(2, 5, dtype=torch.bool), r"goes_on has shape \[2, 5\]; expected \[2, 6\]"),
        ("order", torch.arange(31), r"order has shape \[31\]; expected \[32\]"),
        ("backend", "cuda", "backend is 'cuda'; expected auto, torch or cpu"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: Any, message: str) -> None:
    named = dict(zip(("slots", "k", "v", "weights", "taken", "goes_on", "order"), step(), strict=True))
    with pytest.raises(ValueError, match=message):
        store_slots(**(named | {name: value}))


def test_an_order_that_is_no_permutation_is_refused_by_the_kernel() -> None:
    *arguments, places = step()
    with pytest.raises(RuntimeError, match="order is no permutation"):
        store_slots(*arguments, places.clamp_max(5), backend="cpu")


def test_the_kernel_passes_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_checked", {})
    for dtype in store_slots_native.DTYPES:
        assert store_slots_native.why_not(dtype) is None
    assert all(0 < (check.error or 0) < (1e-6 if "float32" in check.case else 1e-2) for check in native.kernel_checks())


def test_a_broken_kernel_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.load("cpu")
    monkeypatch.setattr(native, "_checked", {})
    monkeypatch.setattr(native, "warn_once", native.warn_once.__wrapped__)
    whole = torch.ops.mnemos.store_slots.default

    def broken(*arguments: Tensor) -> None:
        whole(*arguments)
        arguments[6].mul_(1.01)

    monkeypatch.setattr(torch.ops, "mnemos", SimpleNamespace(store_slots=SimpleNamespace(default=broken)))
    arguments = step()
    with pytest.warns(RuntimeWarning, match="store_slots is not used on cpu .* differ from PyTorch's by"):
        found = store_slots(*arguments)
    assert_same(found, store_slots(*arguments, backend="torch"), 0)
    with pytest.raises(ValueError, match="backend 'cpu' cannot run"):
        store_slots(*arguments, backend="cpu")


def test_a_compiled_call_is_the_same() -> None:
    arguments = step()
    found = torch.compile(store_slots, backend="aot_eager", fullgraph=True)(*arguments)
    assert_same(found, store_slots(*arguments), 0)
