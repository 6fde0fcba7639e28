"""The native memory op for the CPU equals the float64 token loop, with every instruction set that this CPU has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import miras_scan, native
from tests.ops.instruction_sets import ISAS
from tests.ops.reference import token_loop

FP32 = 1e-5  # relative RMSE, values and every gradient
BF16_RANDOM, BF16_REPEATED = 1e-2, 3e-2
VALUES = ("y", "M", "S")
GRADIENTS = ("q", "k", "v", "alpha", "eta", "theta", "M0", "S0")
OPS = torch.ops.mnemos


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    if not native.load("cpu"):
        if os.environ.get("MNEMOS_BUILD") == "off":
            pytest.skip("MNEMOS_BUILD is off")
        pytest.fail(f"the native library for the CPU: {native.why_not('cpu')}")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def isas(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Goes through the instruction sets of this CPU, each in force while it is current."""

    def each() -> Iterator[str]:
        widest = OPS.cpu_isa()
        for isa in ISAS:
            monkeypatch.setenv("MNEMOS_CPU_ISA", isa)
            assert OPS.cpu_isa() == isa
            yield isa
            if isa == widest:
                return

    return each


def make(
    batch: int = 2,
    sequence: int = 65,
    heads: int = 2,
    key_dim: int = 32,
    value_dim: int = 32,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    repeated: int = 0,
) -> list[Tensor]:
    """q, k, v, alpha, eta, theta, M, S in the model's stable region; ``repeated``: the keys are so many, in turns."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    q, k = (F.normalize(normal(batch, sequence, heads, key_dim), dim=-1) for _ in range(2))
    if repeated:
        k = k[:, torch.randint(min(repeated, sequence), (sequence,), generator=rng)]
    v = normal(batch, sequence, heads, value_dim)
    alpha = 0.01 * uniform(batch, sequence, heads)
    eta = 0.9 * uniform(batch, 1, heads).expand(batch, sequence, heads)
    theta = 0.9 * uniform(batch, sequence, heads) * (1 - eta) ** 2
    state = [normal(batch, heads, key_dim, value_dim).float() for _ in range(2)]
    return [x.to(dtype) for x in (q, k, v)] + [x.float().contiguous() for x in (alpha, eta, theta)] + state


def cotangents(x: list[Tensor], seed: int = 1) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(z.shape, generator=rng).to(z.dtype) for z in (x[2], x[6], x[7])]


def starts(batch: int, sequence: int, *places: tuple[int, int]) -> Tensor:
    resets = torch.zeros(batch, sequence, dtype=torch.bool)
    for row, token in places:
        resets[row, token] = True
    return resets


def run(x: list[Tensor], resets: Tensor | None = None, interval: int = 64) -> list[Tensor]:
    """y, M, S, then the gradients of the eight inputs."""
    *values, residuals, states = OPS.miras_scan(*x, resets, interval, True)
    return values + list(OPS.miras_scan_backward(*cotangents(x), *x[:6], resets, residuals, states, interval))


def truth(x: list[Tensor], resets: Tensor | None = None) -> list[Tensor]:
    """The same by the token loop in float64."""
    leaves = [z.double().requires_grad_() for z in x]
    ids = None if resets is None else resets.int().cumsum(dim=1)
    y, (memory, momentum) = token_loop(*leaves[:6], state=(leaves[6], leaves[7]), segment_ids=ids)
    outputs = [y, memory, momentum]
    gradients = torch.autograd.grad(outputs, leaves, [z.double() for z in cotangents(x)], materialize_grads=True)
    return [z.detach() for z in (*outputs, *gradients)]


def errors(actual: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Relative RMSE by name; where the truth is zero, the result's norm."""
    found = {}
    for name, a, b in zip((*VALUES, *(f"d{name}" for name in GRADIENTS)), actual, expected, strict=True):
        assert a.shape == b.shape, name
        scale = float(b.norm())
        found[name] = float((a.double() - b).norm()) / (scale if scale > 0 else 1.0)
    return found


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float, note: str = "") -> None:
    found = errors(actual, expected)
    wrong = {name: f"{error:.1e}" for name, error in found.items() if not error <= tolerance}
    assert not wrong, f"{note}: {wrong}"


def assert_same_op(
    x: list[Tensor], isas: Any, tolerance: float, resets: Tensor | None = None, intervals: tuple[int, ...] = (64,)
) -> None:
    expected = truth(x, resets)
    for isa in isas():
        for interval in intervals:
            assert_close(run(x, resets, interval), expected, tolerance, f"{isa}, interval {interval}")


def test_the_widest_instruction_set_is_the_one_that_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MNEMOS_CPU_ISA", raising=False)
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX2", "AVX512"):
        assert OPS.cpu_isa() in ("avx2", "avx512", "avx512_bf16")
    else:
        assert OPS.cpu_isa() == "generic"
    monkeypatch.setenv("MNEMOS_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="MNEMOS_CPU_ISA is sse9; expected generic, avx2, avx512 or avx512_bf16"):
        OPS.cpu_isa()


@pytest.mark.parametrize("key_dim", [32, 64, 128])
@pytest.mark.parametrize("sequence", [1, 31, 63, 65, 130])
def test_values_and_gradients_equal_the_token_loop(sequence: int, key_dim: int, isas: Any) -> None:
    assert_same_op(make(2, sequence, 2, key_dim, key_dim), isas, FP32)


@pytest.mark.parametrize("key_dim", [32, 64])
def test_a_thousand_tokens(key_dim: int, isas: Any) -> None:
    assert_same_op(make(1, 1000, 2, key_dim, 32), isas, FP32, intervals=(64, 256))


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(32, 16), (64, 16), (32, 48), (64, 48), (32, 96), (64, 192), (128, 384), (128, 80)]
)
def test_values_wider_and_narrower_than_keys(key_dim: int, value_dim: int, isas: Any) -> None:
    assert_same_op(make(1, 75, 2, key_dim, value_dim), isas, FP32)


@pytest.mark.parametrize("repeated", [1, 3, 8])
def test_repeated_keys(repeated: int, isas: Any) -> None:
    assert_same_op(make(2, 200, 2, 32, 32, repeated=repeated), isas, FP32)


@pytest.mark.parametrize("sequence", [1, 63, 65, 1000])
@pytest.mark.parametrize("repeated", [0, 3])
def test_bfloat16(sequence: int, repeated: int, isas: Any) -> None:
    x = make(1, sequence, 2, 32, 48, dtype=torch.bfloat16, repeated=repeated)
    assert_same_op(x, isas, BF16_REPEATED if repeated else BF16_RANDOM)
    *values, residuals, states = OPS.miras_scan(*x, None, 64, True)
    assert [z.dtype for z in values] == [torch.bfloat16, torch.float32, torch.float32]
    gradients = OPS.miras_scan_backward(*cotangents(x), *x[:6], None, residuals, states, 64)
    assert [z.dtype for z in gradients] == [torch.bfloat16] * 3 + [torch.float32] * 5


@pytest.mark.parametrize("key_dim", [64, 128])
def test_bfloat16_of_wider_heads(key_dim: int, isas: Any) -> None:
    assert_same_op(make(2, 100, 2, key_dim, key_dim, dtype=torch.bfloat16), isas, BF16_RANDOM)


@pytest.mark.parametrize("interval", [32, 64, 96, 128, 1024])
def test_the_interval_between_saved_states_changes_nothing(interval: int, isas: Any) -> None:
    x = make(1, 290, 2, 32, 48)
    expected = [run(x, interval=64) for _ in isas()]
    for want, isa in zip(expected, isas(), strict=True):
        for name, a, b in zip((*VALUES, *GRADIENTS), run(x, interval=interval), want, strict=True):
            assert torch.equal(a, b), f"{name}, {isa}"


@pytest.mark.parametrize(
    "places",
    [
        ((0, 32),),
        ((0, 1), (1, 99)),
        ((0, 31), (0, 32), (0, 33), (1, 64)),
        ((0, 63), (0, 64), (0, 65), (1, 65)),
        ((0, 7), (1, 40), (1, 41), (1, 42)),
        tuple((0, token) for token in range(1, 100)),
    ],
    ids=["first of a chunk", "ends", "around a chunk's end", "around an interval's end", "consecutive", "every token"],
)
def test_segments_restart_the_state(places: tuple[tuple[int, int], ...], isas: Any) -> None:
    resets = starts(2, 100, *places)
    assert_same_op(make(2, 100, 2, 32, 32), isas, FP32, resets, intervals=(32, 64, 128))
    assert_same_op(make(2, 100, 2, 32, 32, dtype=torch.bfloat16), isas, BF16_RANDOM, resets)


def test_nothing_crosses_a_segment_border(isas: Any) -> None:
    x = make(1, 100, 2, 32, 32)
    resets = starts(1, 100, (0, 50))
    for _ in isas():
        _, memory, momentum, residuals, states = OPS.miras_scan(*x, resets, 64, True)
        grad_y = torch.zeros_like(x[2])
        grad_y[:, 50:] = 1
        grads = OPS.miras_scan_backward(grad_y, memory, momentum, *x[:6], resets, residuals, states, 64)
        for name, gradient in zip(GRADIENTS, grads, strict=True):
            assert not (gradient if name in ("M0", "S0") else gradient[:, :50]).any(), name
        assert not grads[3][:, 50].any(), "the first token of a segment has nothing to forget"
        assert not grads[4][:, 50].any(), "and no momentum"
        assert torch.equal(OPS.miras_scan(*x[:6], x[6] + 1, x[7] - 1, resets, 64, False)[1], memory)


@pytest.mark.parametrize("gates", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 1.0, 0.1), (1.0, 0.0, 1.0), (0.0, 0.0, 1.0)])
def test_gates_at_the_ends_of_their_range(gates: tuple[float, float, float], isas: Any) -> None:
    x = make(2, 70, 2, 32, 32)
    for gate, value in zip(x[3:6], gates, strict=True):
        gate.fill_(value)
    assert_same_op(x, isas, FP32)


def test_some_gates_are_zero_or_one(isas: Any) -> None:
    x = make(2, 130, 2, 32, 32)
    rng = torch.Generator().manual_seed(2)
    for gate in x[3:6]:
        end = torch.randint(8, gate.shape, generator=rng)
        gate[end == 0] = 0
    x[3][torch.randint(16, x[3].shape, generator=rng) == 0] = 1
    assert_same_op(x, isas, FP32)


def test_a_state_that_only_its_end_is_asked_of(isas: Any) -> None:
    """Gradients of the final state alone, and of the initial one through a single token."""
    for sequence in (1, 33):
        x = make(1, sequence, 2, 32, 16)
        leaves = [z.double().requires_grad_() for z in x]
        _, after = token_loop(*leaves[:6], state=(leaves[6], leaves[7]))
        _, *cotangent = cotangents(x)
        for place in range(2):
            want = torch.autograd.grad(after[place], leaves, cotangent[place].double(), True, materialize_grads=True)
            grads = [torch.zeros_like(x[2]), torch.zeros_like(x[6]), torch.zeros_like(x[7])]
            grads[1 + place] = cotangent[place]
            for isa in isas():
                _, _, _, residuals, states = OPS.miras_scan(*x, None, 64, True)
                got = OPS.miras_scan_backward(*grads, *x[:6], None, residuals, states, 64)
                for name, a, b in zip(GRADIENTS, got, want, strict=True):
                    assert float((a - b).norm()) <= FP32 * max(float(b.norm()), 1e-3), f"{name}, {isa}"


def test_what_is_saved_is_what_it_says(isas: Any) -> None:
    x = make(2, 150, 2, 32, 48)
    resets = starts(2, 150, (0, 70), (1, 64), (1, 128))
    for _ in isas():
        y, memory, momentum, residuals, states = OPS.miras_scan(*x, resets, 64, True)
        assert states.shape == (2, 2, 3, 2, 32, 48)
        for i in range(3):
            state = (x[6], x[7])
            if i:
                part = [z[:, : 64 * i].contiguous() for z in (*x[:6], resets)]
                state = OPS.miras_scan(*part[:6], x[6], x[7], part[6], 64, False)[1:3]
            assert torch.equal(states[:, :, i, 0], state[0])
            assert torch.equal(states[:, :, i, 1], state[1])
        # y = q M and r = k M - v at the same memory, a token apart: of a query that equals the next key.
        shifted = [x[1].roll(-1, dims=1), *x[1:]]
        read = OPS.miras_scan(*shifted, resets, 64, False)[0][:, :-1] * ~resets[:, 1:, None, None]
        expected = (read - x[2][:, 1:]).transpose(1, 2).double()
        assert float((residuals[:, :, 1:] - expected).norm()) <= FP32 * float(expected.norm())
        plain = OPS.miras_scan(*x, resets, 64, False)
        assert all(torch.equal(a, b) for a, b in zip(plain[:3], (y, memory, momentum), strict=True))
        assert plain[3].shape == plain[4].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_same_bits_twice_on_any_number_of_threads(threads: int, dtype: torch.dtype, isas: Any) -> None:
    """One head for several threads is cut into slices of its columns; five items do not go evenly into two."""
    torch.set_num_threads(threads)
    for batch, heads, value_dim in ((1, 1, 80), (1, 5, 32)):
        x = make(batch, 100, heads, 32, value_dim, dtype=dtype)
        resets = starts(batch, 100, (0, 45))
        expected = truth(x, resets)
        for isa in isas():
            first, second = run(x, resets), run(x, resets)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), isa
            assert_close(first, expected, FP32 if dtype == torch.float32 else BF16_RANDOM, isa)


def test_values_do_not_depend_on_the_number_of_threads(isas: Any) -> None:
    x = make(1, 100, 1, 64, 112)
    for isa in isas():
        results = []
        for count in (1, 2, 4, 7):
            torch.set_num_threads(count)
            results.append(OPS.miras_scan(*x, None, 64, True))
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True)), isa


def test_denormal_numbers_are_zero_inside_and_as_before_outside(isas: Any) -> None:
    x = make(1, 300, 2, 32, 32)
    for gate in x[3:5]:
        gate.fill_(0.5)  # memory and momentum halve at every token: products of gates underflow
    x[5][:, 40:] = 0
    tiny = torch.full((64,), 1e-40)
    for count in (1, 2):
        torch.set_num_threads(count)
        for _ in isas():
            y, memory, _, _, states = OPS.miras_scan(*x, None, 64, True)
            run(x)
            assert y[:, :30].any() and not memory.any()
            for z in (y, states):
                assert not ((z != 0) & (z.abs() < torch.finfo(torch.float32).tiny)).any()
            assert (tiny * 0.5 > 0).all()
            # Every worker thread has its own mode: enough elements that torch uses them.
            assert (tiny.repeat(10_000) * 0.5 > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("place", range(8))
def test_what_is_not_finite_neither_crashes_nor_leaves_its_head(place: int, value: float, isas: Any) -> None:
    x = make(1, 70, 2, 32, 32)
    resets = starts(1, 70, (0, 20))
    bad = [z.clone() for z in x]
    bad[place][(0, 0, 5) if place >= 6 else (0, 5, 0)] = value
    for isa in isas():
        for name, a, b in zip((*VALUES, *GRADIENTS), run(bad, resets), run(x, resets), strict=True):
            head = 1 if name in ("M", "S", "M0", "S0") else 2
            assert torch.equal(a.select(head, 1), b.select(head, 1)), f"{name}, {isa}"


def test_memory_of_a_training_step_is_at_most_three_times_inputs_and_outputs() -> None:
    """All that is alive at once, the gradients included, at one sequence of 8,192 tokens and four heads of 64."""
    torch.set_num_threads(2)
    x = make(1, 8192, 4, 64, 64)
    grads = cotangents(x)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        *values, residuals, states = OPS.miras_scan(*x, None, 64, True)
        gradients = OPS.miras_scan_backward(*grads, *x[:6], None, residuals, states, 64)
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)

    def size(tensors: Any) -> int:
        return sum(z.nbytes for z in tensors)

    assert peak >= size(values) + size([residuals, states]) + size(gradients), "the profiler missed an allocation"
    assert peak + size(x) + size(grads) <= 3 * (size(x) + size(values))


def _changed(index: int, change: Any) -> list[Tensor]:
    x = make(1, 40, 2, 32, 32)
    x[index] = change(x[index])
    return x


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda z: z[..., :24].contiguous(), "the key dim is 24; expected 32, 64 or 128"),
        (0, lambda z: z.double(), "q is neither float32 nor bfloat16"),
        (0, lambda z: z[0], "four dimensions"),
        (1, lambda z: z.bfloat16(), "k has an unexpected dtype"),
        (1, lambda z: z[:, :-1].contiguous(), "k has an unexpected shape"),
        (1, lambda z: z.transpose(1, 2).contiguous().transpose(1, 2), "k is not contiguous"),
        (2, lambda z: z[..., :24].contiguous(), "the value dim is 24; expected a multiple of 16"),
        (3, lambda z: z[:, :-1].contiguous(), "alpha has an unexpected shape"),
        (4, lambda z: z.double(), "eta has an unexpected dtype"),
        (5, lambda z: z.bfloat16(), "theta has an unexpected dtype"),
        (6, lambda z: z[..., :16].contiguous(), "memory has an unexpected shape"),
        (7, lambda z: z.mT, "momentum is not contiguous"),
    ],
)
def test_what_would_be_read_out_of_bounds_is_refused(index: int, change: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.miras_scan(*_changed(index, change), None, 64, True)


def test_wrong_options_are_refused() -> None:
    x = make(1, 40, 2, 32, 32)
    for interval in (0, -32, 48):
        with pytest.raises(RuntimeError, match=f"the interval is {interval}; expected a multiple of 32"):
            OPS.miras_scan(*x, None, interval, True)
    with pytest.raises(RuntimeError, match="resets has an unexpected dtype"):
        OPS.miras_scan(*x, torch.zeros(1, 40, dtype=torch.int64), 64, True)
    *_, residuals, states = OPS.miras_scan(*x, None, 64, False)
    with pytest.raises(RuntimeError, match="residuals has an unexpected shape"):
        OPS.miras_scan_backward(*cotangents(x), *x[:6], None, residuals, states, 64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_drift_over_128k_tokens(
    dtype: torch.dtype, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    """Errors do not build up: the last of 128K tokens is as good as the first, values and gradients.

    Forget rates go down to 1e-6, so that the memory keeps its errors for the whole sequence. The values are those of
    the token loop; the gradients, whose tape would not fit, those of the chunked op in float64.
    """
    torch.set_num_threads(1)  # the loop's products are too small to share
    sequence, window = 131_072, 16_384
    x = make(1, sequence, 4, 32, 16, dtype=dtype)
    x[3] = x[3] * torch.tensor([1.0, 1e-2, 1e-3, 1e-4])
    x[1][:, :, 2:] = x[1][:, torch.arange(sequence) % 24, 2:]  # two heads see the same keys over and over
    with torch.no_grad():
        y, state = token_loop(*x[:6], state=(x[6], x[7]))
    leaves = [z.double().requires_grad_() for z in x]
    outputs = miras_scan(*leaves[:6], state=(leaves[6], leaves[7]), backend="torch")
    grads = cotangents(x)
    wanted = torch.autograd.grad((outputs[0], *outputs[1]), leaves, [z.double() for z in grads])
    actual = run(x)
    tolerance = FP32 if dtype == torch.float32 else BF16_REPEATED
    expected = [y, *state, *wanted]
    largest = 0.0
    with capsys.disabled():
        print(f"\n{dtype}, {sequence} tokens, relative RMSE by window of {window}:")
        for name, a, b in zip((*VALUES, *(f"d{n}" for n in GRADIENTS)), actual, expected, strict=True):
            parts = zip(a.split(window, 1), b.split(window, 1), strict=True) if a.shape[1] == sequence else [(a, b)]
            found = [float((p.double() - r).norm() / r.norm()) for p, r in parts]
            print(f"  {name:7s}", " ".join(f"{error:.1e}" for error in found))
            largest = max(largest, *found)
            assert max(found) <= tolerance, name
    record_property(f"largest relative RMSE, {dtype}", f"{largest:.1e}")
