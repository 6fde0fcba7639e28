"""The affine scan is the loop over tokens, on every backend: values, gradients, segments, dtypes."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops import affine_scan_native, native
from pipeline.ops.affine_scan import affine_scan
from tests.ops.affine_scan_reference import affine_loop, affine_loop_gradients

BACKENDS = ("torch", "cpu")
# The widest set of instructions of this processor, and the narrower ones.
SETS = {"AVX512": ("generic", "avx2", "avx512"), "AVX2": ("generic", "avx2")}.get(
    torch.backends.cpu.get_cpu_capability(), ("generic",)
)
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("h", "after", "grad a", "grad b", "grad state")
# Relative RMSE, by the dtype of the result.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3e-3}


def make(
    *shape: int,
    a: torch.dtype = torch.float64,
    b: torch.dtype | None = None,
    seed: int = 0,
    factor: Callable[[Tensor], Tensor] = torch.tanh,
) -> list[Tensor]:
    """a, b and the state as leaves; one factor in eight is exactly 0, one exactly 1."""
    b = a if b is None else b
    rng = torch.Generator().manual_seed(seed)
    normal = [torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2)]
    factors = factor(2 * normal[0])
    ends = (torch.rand(shape, generator=rng) * 8).floor()
    factors = torch.where(ends == 0, 0.0, torch.where(ends == 1, 1.0, factors))
    wide = torch.float64 if torch.float64 in (a, b) else torch.float32
    state = torch.randn(shape[0], *shape[2:], generator=rng, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x, dtype in ((factors, a), (normal[1], b), (state, wide))]


def results(x: Sequence[Tensor], *, seed: int = 1, **options) -> list[Tensor]:
    """h, after, and the gradients of a, b and the state under a random cotangent."""
    outputs = affine_scan(x[0], x[1], state=x[2], **options)
    return [*outputs, *torch.autograd.grad(outputs, x, cotangents(x, seed))]


def cotangents(x: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(z.shape, generator=rng, dtype=torch.float64).to(z.dtype) for z in (x[1], x[2])]


def truth(x: Sequence[Tensor], segment_ids: Tensor | None = None) -> list[Tensor]:
    """The loop and its gradients by autograd, in float64."""
    leaves = [z.detach().double().requires_grad_() for z in x]
    outputs = affine_loop(leaves[0], leaves[1], state=leaves[2], segment_ids=segment_ids)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [z.double() for z in cotangents(x)])]


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def assert_close(
    actual: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str] = NAMES, *, scale: float = 1.0
) -> None:
    for name, x, y in zip(names, actual, expected, strict=True):
        assert x.shape == y.shape
        if not y.any():
            assert not x.any(), name
        else:
            assert error(x, y) <= scale * TOLERANCE[x.dtype], f"{name}: {error(x, y):.2e}"


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def segments(batch: int, sequence: int, change: float | None, seed: int = 0) -> Tensor | None:
    if change is None:
        return None
    rng = torch.Generator().manual_seed(seed)
    # Ids that come back: a segment is a run of equal ids, not an id.
    return (torch.rand(batch, sequence, generator=rng) < change).int().cumsum(dim=1) % 2


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


@pytest.mark.parametrize("change", [None, 0.3])
def test_gradcheck(change: float | None) -> None:
    x = make(2, 11, 3)
    ids = segments(2, 11, change)
    assert torch.autograd.gradcheck(lambda a, b, s: affine_scan(a, b, state=s, segment_ids=ids), x)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_the_op_keeps_what_pytorch_asks_of_one(learns: bool, resets: bool) -> None:
    assert affine_scan_native.why_not("cpu", torch.float32, torch.float32) is None
    a, b, state = (x.detach().requires_grad_(learns) for x in make(2, 50, 7, a=torch.float32))
    cuts = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) > 0.9 if resets else None
    checked = torch.library.opcheck(torch.ops.mnemos.affine_scan.default, (a, b, state, cuts, 16, learns))
    assert set(checked.values()) == {"SUCCESS"}
    if learns:
        _, after, states = torch.ops.mnemos.affine_scan(a, b, state, cuts, 16, True)
        assert not states.requires_grad
        inputs = [x.detach() for x in (b, after, a, b)]
        backward = torch.ops.mnemos.affine_scan_backward.default
        assert set(torch.library.opcheck(backward, (*inputs, cuts, states, 16)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_it_compiles_to_one_graph(backend: str) -> None:
    def layer(a: Tensor, b: Tensor, state: Tensor, ids: Tensor) -> Tensor:
        h, after = affine_scan(a.sigmoid(), b, state=state, segment_ids=ids, backend=backend)
        return h.sin().sum() + after.sum()

    ids = segments(2, 30, 0.1)
    x = make(2, 30, 7, a=torch.float32)
    expected = layer(*x, ids)
    actual = torch.compile(layer, fullgraph=True, backend="aot_eager")(*x, ids)
    assert torch.allclose(actual, expected, rtol=1e-6)
    for y, z in zip(*(torch.autograd.grad(w, x) for w in (actual, expected)), strict=True):
        assert torch.allclose(y, z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_differentiable_once_and_says_so(backend: str) -> None:
    x = make(1, 20, 3, a=torch.float32)
    h, _ = affine_scan(*x[:2], state=x[2], backend=backend)
    (gradient,) = torch.autograd.grad((h * h).sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once|once_differentiable"):
        gradient.sum().backward()


def test_an_op_that_saved_nothing_says_so() -> None:
    assert affine_scan_native.why_not("cpu", torch.float32, torch.float32) is None
    h, _, _ = torch.ops.mnemos.affine_scan(*make(1, 20, 3, a=torch.float32), None, 16, False)
    with pytest.raises(RuntimeError, match="save=False"):
        h.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_part_of_the_gradients(backend: str) -> None:
    """Outputs that nothing uses, inputs that need no gradient, and an expanded cotangent."""
    a, b, state = make(2, 30, 5, a=torch.float32)
    whole = results([a, b, state], backend=backend)
    h, after = affine_scan(a.detach(), b, state=state.detach(), backend=backend)
    (gradient,) = torch.autograd.grad((h, after), b, cotangents([a, b, state]))
    assert_same([gradient], [whole[3]])
    for output in (0, 1):
        outputs = affine_scan(a, b, state=state, backend=backend)
        actual = torch.autograd.grad(outputs[output].sum(), (a, b, state))
        leaves = [z.detach().double().requires_grad_() for z in (a, b, state)]
        loop = affine_loop(*leaves[:2], state=leaves[2])
        assert_close(actual, torch.autograd.grad(loop[output].sum(), leaves), NAMES[2:])
    with torch.no_grad():
        assert not affine_scan(a, b, backend=backend)[0].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_lower_the_precision(backend: str) -> None:
    x = make(1, 100, 5, a=torch.float32)
    expected = results(x, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = results(x, backend=backend)
    assert_same(actual, expected)


def test_strided_inputs() -> None:
    x = make(3, 40, 5, a=torch.float32)
    strided = [z.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for z in x]
    for backend in ("auto", "torch"):
        assert_same(results(strided, backend=backend), results(x, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_left_as_they_are(backend: str) -> None:
    x = make(2, 300, 5, a=torch.float32)
    before = [z.detach().clone() for z in x]
    results(x, backend=backend)
    assert_same([z.detach() for z in x], before)
    h, after = affine_scan(*x[:2], state=x[2], backend=backend)
    assert after.untyped_storage().nbytes() == after.nbytes, "a saved state would drag a larger tensor along"
    assert h.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept_for_the_backward_pass(dtype: torch.dtype) -> None:
    """The inputs, and a float32 state for every 16 tokens."""
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = make(2, 1600, 70, a=dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        h, _ = affine_scan(*x[:2], state=x[2], backend="cpu")
    kept = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    assert h.requires_grad
    assert kept == x[0].nbytes + x[1].nbytes + 4 * 2 * 100 * 70


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


def test_a_kernel_that_fails_its_check_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(1, 40, 3, a=torch.float32)
    expected = results(x, backend="torch")
    monkeypatch.setattr(native, "_verdicts", {})
    monkeypatch.setattr(affine_scan_native, "_largest_error", lambda *_: math.nan)
    native.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="affine_scan is not used on cpu"):
        actual = results(x)
    assert_same(actual, expected)
    with pytest.raises(ValueError, match="backend 'cpu' cannot run: its results differ"):
        affine_scan(*x[:2], backend="cpu")


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_the_check_at_first_use_tells_right_from_wrong(
    dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert affine_scan_native._largest_error("cpu", *dtypes) <= 1e-3
    real = affine_scan_native.affine_scan_native

    def wrong(a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
        return real(a, b, state, None)

    monkeypatch.setattr(affine_scan_native, "affine_scan_native", wrong)
    assert not affine_scan_native._largest_error("cpu", *dtypes) <= 1e-2


def _replace(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    a, b, state = (z.detach() for z in make(2, 5, 4, 6, a=torch.float32))
    arguments = {"a": a, "b": b, "state": state, "segment_ids": torch.zeros(2, 5, dtype=torch.int64)}
    return arguments | {name: change(arguments[name])}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("b", lambda z: z[:, 0, 0, 0], r"b has shape \[2\]; expected \[batch, sequence, \*features\]"),
        ("b", lambda z: z[:, :0], r"b has shape \[2, 0, 4, 6\]"),
        ("b", lambda z: z.half(), "b is float16; expected float64 or float32 or bfloat16"),
        ("a", lambda z: z[:, :4], r"a has shape \[2, 4, 4, 6\]; expected that of b, \[2, 5, 4, 6\], or 1 in place"),
        ("a", lambda z: z[:, :1], r"a has shape \[2, 1, 4, 6\]"),
        ("a", lambda z: z[..., 0], r"a has shape \[2, 5, 4\]"),
        ("a", lambda z: z.int(), "a is int32; expected float64 or float32 or bfloat16"),
        ("a", lambda z: z.to("meta"), "a is on meta; expected the device of b, cpu"),
        ("state", lambda z: z[:1], r"state has shape \[1, 4, 6\]; expected \[2, 4, 6\]"),
        ("state", lambda z: z.bfloat16(), "state is bfloat16; expected float32"),
        ("state", lambda z: z.double(), "state is float64; expected float32"),
        ("state", lambda z: z.to("meta"), "state is on meta"),
        ("segment_ids", lambda z: z[:, :4], r"segment_ids has shape \[2, 4\]; expected \[2, 5\]"),
        ("segment_ids", lambda z: z.float(), "segment_ids is float32; expected an integer type"),
        ("segment_ids", lambda z: z.bool(), "segment_ids is bool; expected an integer type"),
        ("segment_ids", lambda z: z.to("meta"), "segment_ids is on meta"),
    ],
)
def test_wrong_tensors_are_named(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    arguments = _replace(name, change)
    with pytest.raises(ValueError, match=message):
        affine_scan(arguments.pop("a"), arguments.pop("b"), **arguments)


@pytest.mark.parametrize(
    ("name", "change", "backend", "message"),
    [
        ("a", lambda z: z, "fast", "backend is 'fast'; expected 'auto', 'torch', 'cpu' or 'cuda'"),
        ("a", lambda z: z, "cuda", r"a is float32 \[2, 5, 4, 6\] .* on cpu; backend 'cuda' expects a cuda tensor"),
        (
            "a",
            lambda z: z.mT.contiguous().mT,
            "cpu",
            r"a is float32 \[2, 5, 4, 6\] with strides \[120, 24, 1, 4\] on cpu; .* a contiguous tensor",
        ),
        ("state", lambda z: z.mT.contiguous().mT, "cpu", r"state is float32 \[2, 4, 6\] .* a contiguous"),
    ],
)
def test_what_a_forced_backend_cannot_take_is_named(
    name: str, change: Callable[[Tensor], Tensor], backend: str, message: str
) -> None:
    arguments = _replace(name, change)
    with pytest.raises(ValueError, match=message):
        affine_scan(arguments.pop("a"), arguments.pop("b"), backend=backend, **arguments)


def test_float64_is_for_pytorch() -> None:
    x = make(1, 5, 2)
    assert affine_scan(*x[:2])[0].dtype == torch.float64
    with pytest.raises(ValueError, match=r"a is float64 \[1, 5, 2\] .*; backend 'cpu' expects float32 or bfloat16"):
        affine_scan(*x[:2], backend="cpu")
