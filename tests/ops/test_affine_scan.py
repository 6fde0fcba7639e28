"""The affine scan is the loop over tokens, on every backend: values, gradients, segments, dtypes."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops import native
from pipeline.ops.affine_scan import affine_scan
from tests.ops.affine_scan_cases import (
    BACKENDS,
    DTYPES,
    assert_close,
    assert_same,
    cotangents,
    error,
    make,
    results,
    segments,
    truth,
)
from tests.ops.affine_scan_reference import affine_loop, affine_loop_gradients
from tests.ops.instruction_sets import ISAS

# The widest set of instructions of this processor, and the narrower ones.
SETS = ISAS[: ISAS.index(torch.ops.mnemos.cpu_isa()) + 1] if native.load("cpu") else ISAS[:1]


@pytest.mark.parametrize("change", [None, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("sequence", [1, 2, 63, 64, 65, 1000])
def test_pytorch_equals_the_token_loop(sequence: int, change: float | None) -> None:
    x = make(2, sequence, 5)
    ids = segments(2, sequence, change)
    assert_close(results(x, segment_ids=ids), truth(x, ids))


@pytest.mark.parametrize("change", [None, 0.02], ids=["one segment", "segments"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sequence", [1, 63, 65, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_equal_the_token_loop(
    backend: str, sequence: int, dtype: torch.dtype, change: float | None
) -> None:
    x = make(2, sequence, 70, a=dtype)
    ids = segments(2, sequence, change)
    actual = results(x, segment_ids=ids, backend=backend)
    assert [z.dtype for z in actual] == [dtype, torch.float32, dtype, dtype, torch.float32]
    assert_close(actual, truth(x, ids))


# Rows that are short, of known width or not; of full vectors or not; in several blocks; with time in pieces.
SHAPES = [
    (1, 40, 1),
    (2, 50, 2),
    (1, 50, 4),
    (3, 50, 8),
    (2, 50, 13),
    (1, 50, 64),
    (2, 40, 1500),
    (1, 2100, 3),
    (1, 5000, 8),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("b", DTYPES, ids=str)
@pytest.mark.parametrize("a", DTYPES, ids=str)
@pytest.mark.parametrize("instructions", SETS)
def test_every_instruction_set(
    instructions: str, a: torch.dtype, b: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNEMOS_CPU_ISA", instructions)
    x, ids, expected = case(shape, a, b)
    actual = results(x, segment_ids=ids, backend="cpu")
    assert [z.dtype for z in actual] == [b, torch.float32, a, b, torch.float32]
    assert_close(actual, expected)


@functools.cache
def case(
    shape: tuple[int, ...], a: torch.dtype, b: torch.dtype
) -> tuple[list[Tensor], Tensor | None, tuple[Tensor, ...]]:
    """Inputs, segment ids and the truth; the same for every instruction set."""
    x = make(*shape, a=a, b=b)
    ids = segments(shape[0], shape[1], 0.02)
    leaves = [z.detach() for z in x]
    h, after = affine_loop(leaves[0], leaves[1], state=leaves[2], segment_ids=ids)
    gradients = affine_loop_gradients(leaves[0], h, leaves[2], *cotangents(x), ids)
    return x, ids, (h, after, *gradients)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    sequence=st.integers(1, 90),
    features=st.lists(st.integers(1, 9), max_size=3),
    a=st.sampled_from([torch.float64, *DTYPES]),
    b=st.sampled_from([torch.float64, *DTYPES]),
    change=st.sampled_from([None, 0.05, 0.5]),
    seed=st.integers(0, 10_000),
)
def test_any_shape(
    batch: int,
    sequence: int,
    features: list[int],
    a: torch.dtype,
    b: torch.dtype,
    change: float | None,
    seed: int,
) -> None:
    x = make(batch, sequence, *features, a=a, b=b, seed=seed)
    ids = segments(batch, sequence, change, seed)
    expected = truth(x, ids)
    assert_close(results(x, segment_ids=ids, backend="torch"), expected)
    assert_close(results(x, segment_ids=ids), expected)


@pytest.mark.parametrize("sequence", [100, 2500])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.999])
@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_factors(backend: str, value: float, sequence: int) -> None:
    x = make(1, sequence, 3, a=torch.float32, factor=lambda z: torch.full_like(z, value))
    with torch.no_grad():
        x[0].fill_(value)
    # With factors of 1 nothing is ever forgotten, an error neither.
    assert_close(results(x, backend=backend), truth(x), scale=5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_beyond_the_range_of_float32(backend: str) -> None:
    """In pieces of time, the product of factors may be 4^100 where the state is tiny, and infinite where it is zero."""
    x = make(1, 4200, 3, a=torch.float32)
    with torch.no_grad():
        x[1].zero_()
        x[1][:, -1] = 1.0
        x[2].copy_(torch.tensor([0.0, 2.0**-120, 2.0**-120]))
        x[0].fill_(4.0)
        x[0][:, 100:, 1:] = 1.0
        x[0][:, 500, 2] = 0.0
        x[0][:, :, 0] = 1e30
    with torch.no_grad():
        actual = affine_scan(x[0], x[1], state=x[2], backend=backend)
    expected = affine_loop(*x[:2], state=x[2])
    assert all(z.isfinite().all() for z in actual)
    assert actual[0].max() > 2.0**50
    assert all(error(y, z) <= 1e-6 for y, z in zip(actual, expected, strict=True))


def test_what_is_no_number_stays_so_in_bfloat16() -> None:
    """Of a NaN with all bits set, rounding would carry into the sign."""
    a, b, state = (z.detach() for z in make(1, 40, 70, a=torch.float32, b=torch.bfloat16))
    a.fill_(0.5)
    a[0, 20, 3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    h, _ = affine_scan(a, b, state=state, backend="cpu")
    assert h[0, 20:, 3].isnan().all() and h[0, :20].isfinite().all() and h[0, :, 4:].isfinite().all()


@pytest.mark.parametrize("border", [1, 30, 1024, 2900])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_crosses_a_segment_border(backend: str, border: int) -> None:
    """Not even what is no number, forwards or backwards."""
    x = make(1, 3000, 3, a=torch.float32)
    with torch.no_grad():
        x[0].clamp_(min=0.99)
    ids = (torch.arange(3000)[None] >= border).int()
    h, after = affine_scan(*x[:2], state=x[2], segment_ids=ids, backend=backend)
    grad_h = torch.randn_like(h)
    before = torch.autograd.grad((h[:, border:] * grad_h[:, border:]).sum() + after.sum(), x, retain_graph=True)
    assert not before[0][:, : border + 1].any(), "the first token of a segment multiplies nothing"
    assert not before[1][:, :border].any()
    assert not before[2].any()

    with torch.no_grad():
        broken = x[1].clone()
        broken[:, border - 1] = torch.nan
        wrong, wrong_after = affine_scan(x[0], broken, state=x[2], segment_ids=ids, backend=backend)
    assert wrong[:, border - 1].isnan().all()
    assert torch.equal(wrong[:, border:], h[:, border:]) and torch.equal(wrong_after, after)

    clean = torch.autograd.grad((h, after), x, (grad_h, torch.zeros_like(after)), retain_graph=True)
    grad_h = grad_h.clone()
    grad_h[:, border] = torch.inf
    dirty = torch.autograd.grad((h, after), x, (grad_h, torch.zeros_like(after)))
    assert_same(
        [dirty[0][:, :border], dirty[1][:, :border], dirty[2]], [clean[0][:, :border], clean[1][:, :border], clean[2]]
    )


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("cut", [1, 16, 50, 99])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_in_two_pieces_with_carried_state(backend: str, cut: int, segmented: bool) -> None:
    x = make(2, 100, 6, a=torch.float32)
    ids = None
    if segmented:
        ids = torch.tensor([3, 1, 3]).repeat_interleave(torch.tensor([30, 40, 30])).expand(2, 100)
    state, outputs = x[2], []
    for part in (slice(0, cut), slice(cut, 100)):
        part_ids = None if ids is None else ids[:, part]
        h, state = affine_scan(x[0][:, part], x[1][:, part], state=state, segment_ids=part_ids)
        outputs.append(h)
    pieces = [torch.cat(outputs, dim=1), state]
    whole = affine_scan(*x[:2], state=x[2], segment_ids=ids, backend=backend)
    gradients = [torch.autograd.grad(z, x, cotangents(x)) for z in (pieces, whole)]
    for y, z in zip([*pieces, *gradients[0]], [*whole, *gradients[1]], strict=True):
        assert error(y, z) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_state_is_a_state_of_zeros(backend: str) -> None:
    a, b, state = make(2, 30, 5, a=torch.float32)
    expected = affine_scan(a, b, state=torch.zeros_like(state), backend=backend)
    assert_same(affine_scan(a, b, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_factor_that_features_share(backend: str) -> None:
    x = make(2, 40, 4, 6, a=torch.float32)
    shared = x[0].detach()[:, :, :, :1].clone().requires_grad_()
    full = shared.detach().expand(2, 40, 4, 6).contiguous().requires_grad_()
    actual = results([shared, *x[1:]], backend=backend)
    expected = results([full, *x[1:]], backend=backend)
    expected[2] = expected[2].sum(dim=-1, keepdim=True)
    assert actual[2].shape == (2, 40, 4, 1)
    for y, z in zip(actual, expected, strict=True):
        assert error(y, z) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 500, 70), (1, 5000, 3)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_twice_and_on_any_number_of_threads(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = make(*shape, a=dtype)
    ids = segments(shape[0], shape[1], 0.01)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            runs.append(results(x, segment_ids=ids, backend=backend))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert_same(run, runs[0])


def test_drift_over_a_long_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    """128K tokens, factors from nearly 0 to 1 - 1e-5: rounding errors decay with what they are errors of."""
    sequence, features = 131_072, 6
    rng = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.5, 0.1, 1e-2, 1e-3, 1e-4, 1e-5])
    a = (1 - rates * 2 * torch.rand(1, sequence, features, generator=rng)).requires_grad_()
    b, grad_h = (torch.randn(1, sequence, features, generator=rng) for _ in range(2))
    b = b.requires_grad_()
    state, h, g = (np.zeros(features) for _ in range(3))
    truth_h, truth_a, truth_b = (np.empty((sequence, features)) for _ in range(3))
    factors, inputs, grads = (x.detach()[0].double().numpy() for x in (a, b, grad_h))
    for t in range(sequence):
        h = factors[t] * h + inputs[t]
        truth_h[t] = h
    for t in reversed(range(sequence)):
        g = g + grads[t]
        truth_b[t] = g
        truth_a[t] = g * (truth_h[t - 1] if t else state)
        g = factors[t] * g
    expected = [torch.from_numpy(x) for x in (truth_h, truth_a, truth_b)]
    for backend in BACKENDS:
        output, _ = affine_scan(a, b, backend=backend)
        gradients = torch.autograd.grad(output, (a, b), grad_h)
        for name, x, y in zip(("h", "grad a", "grad b"), (output, *gradients), expected, strict=True):
            errors = [error(x[0, :, i], y[:, i]) for i in range(features)]
            with capsys.disabled():
                print(
                    f"\ndrift over {sequence} tokens, {backend}, {name}: " + " ".join(f"{e:.1e}" for e in errors),
                    end="",
                )
            assert max(errors) <= 1e-5
