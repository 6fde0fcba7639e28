"""One token of the memory op, in place: the float64 token loop, with every instruction set that this CPU has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings, strategies
from torch import Tensor

from pipeline.ops import memory_step_native, miras_scan, native
from pipeline.ops.memory_step import memory_step
from tests.ops.instruction_sets import ISAS
from tests.ops.memory_step_cases import BF16, FP32, NAMES, assert_close, expected, make, summands
from tests.ops.reference import token_loop

BACKENDS = ("torch", "cpu")


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


def run(x: dict[str, Tensor | None], backend: str = "auto", out: Tensor | None = None) -> list[Tensor]:
    """The read and both states after; those of ``x`` stay as they are."""
    states = {name: x[name].clone() for name in ("memory", "momentum")}
    y = memory_step(**{**x, **states}, out=out, backend=backend)
    return [y, *states.values()]


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key_dim", [32, 64, 128])
def test_every_instruction_set_equals_the_token_loop(
    key_dim: int, dtype: torch.dtype, momentum: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value dims of whole spans of 64 columns, and with blocks of 32 and 16 left over."""
    widest = torch.ops.mnemos.cpu_isa()
    for value_dim in (16, 64, 112, 128, 208):
        x = make(key_dim=key_dim, value_dim=value_dim, dtype=dtype, momentum=momentum)
        wanted = expected(x)
        for isa in ISAS[: ISAS.index(widest) + 1]:
            monkeypatch.setenv("MNEMOS_CPU_ISA", isa)
            actual = run(x, "cpu")
            assert actual[0].dtype == dtype
            assert_close(actual, wanted, BF16 if dtype == torch.bfloat16 else FP32)


@given(
    rows=strategies.integers(1, 4),
    heads=strategies.integers(1, 5),
    key_dim=strategies.sampled_from([1, 5, 32, 64]),
    value_dim=strategies.sampled_from([1, 7, 16, 32, 80]),
    momentum=strategies.booleans(),
    dtype=strategies.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=strategies.integers(0, 2**20),
)
@example(rows=1, heads=1, key_dim=1, value_dim=1, momentum=True, dtype=torch.float32, seed=1)
@settings(max_examples=60)
def test_any_shape_and_dtype_equals_the_token_loop(
    rows: int, heads: int, key_dim: int, value_dim: int, momentum: bool, dtype: torch.dtype, seed: int
) -> None:
    x = make(rows, heads, key_dim, value_dim, dtype=dtype, seed=seed, momentum=momentum)
    wanted = expected(x)
    for grad in (True, False):  # without gradients the kernel looks at its arguments alone
        with torch.set_grad_enabled(grad):
            actual = run(x)
        assert actual[0].dtype == dtype
        bounds = {torch.float64: (1e-13, 1e-13), torch.float16: (1e-3, FP32), torch.bfloat16: (1e-2, FP32)}
        assert_close(actual, wanted, *bounds.get(dtype, (FP32, FP32)), sizes=summands(x, wanted))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_steps_equal_the_token_loop_and_the_scan(backend: str) -> None:
    x = make(key_dim=64, value_dim=64, tokens=200)
    size = x["alpha"].shape
    x["alpha"] = 0.01 * x["alpha"]
    x["eta"] = torch.full(size, 0.5)
    x["theta"] = 0.25 * x["theta"]
    tokens = [x[name] for name in NAMES[:6]]
    y, after = token_loop(*tokens, state=(x["memory"], x["momentum"]))
    memory, momentum = x["memory"].clone(), x["momentum"].clone()
    with torch.no_grad():
        reads = [memory_step(*(z[:, t] for z in tokens), memory, momentum, backend=backend) for t in range(200)]
    assert_close([torch.stack(reads, dim=1), memory, momentum], [y, *after], 2e-6, 2e-6)
    parallel, ends = miras_scan(*tokens, state=(x["memory"], x["momentum"]))
    assert_close([torch.stack(reads, dim=1), memory, momentum], [z.double() for z in (parallel, *ends)], 2e-5, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_momentum_what_s_was_has_no_part(backend: str) -> None:
    x = make(momentum=False)
    clean = run(x, backend)
    x["momentum"] = torch.full_like(x["momentum"], math.nan)
    assert all(torch.equal(a, b) for a, b in zip(run(x, backend), clean, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [True, False])
def test_the_result_is_put_where_it_is_wanted(backend: str, grad: bool) -> None:
    x = make()
    out = torch.full_like(x["v"], math.nan)
    with torch.set_grad_enabled(grad):
        y, *_ = run(x, backend, out)
        assert y is out and torch.equal(y, run(x, backend)[0])


@pytest.mark.parametrize("grad", [True, False])
def test_strided_tokens_and_gates(grad: bool) -> None:
    x = make(key_dim=32, value_dim=48)
    wanted = expected(x)
    for name in NAMES[:6]:
        x[name] = torch.stack([x[name]] * 2, dim=-1)[..., 0]
    x["eta"] = x["eta"][0].expand(2, 3)
    with torch.set_grad_enabled(grad):
        for backend in ("auto", *BACKENDS):
            assert_close(run(x, backend), expected(x))
    assert not torch.equal(wanted[0], expected(x)[0])


@pytest.mark.parametrize("grad", [True, False])
def test_strided_states_are_pytorchs(grad: bool) -> None:
    """In place they are; a kernel would write to a copy."""
    x = make(key_dim=32, value_dim=32)
    wanted = expected(x)
    memory, momentum = (x[name].mT.contiguous().mT for name in ("memory", "momentum"))
    with torch.set_grad_enabled(grad):
        y = memory_step(*(x[name] for name in NAMES[:6]), memory, momentum)
        with pytest.raises(ValueError, match=r"memory is float32 .* expects a contiguous tensor"):
            memory_step(*(x[name] for name in NAMES[:6]), memory, momentum, backend="cpu")
    assert_close([y, memory, momentum], wanted)


def test_rows_heads_and_threads_change_no_bit() -> None:
    x = make(3, 4, 128, 128)
    with torch.no_grad():
        torch.set_num_threads(1)
        one = run(x)
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(run(x), one, strict=True))
        for row in range(3):
            apart = run({name: None if z is None else z[row : row + 1, 1:2] for name, z in x.items()})
            assert all(torch.equal(a, b[row : row + 1, 1:2]) for a, b in zip(apart, one, strict=True))


def test_a_row_that_is_no_number_stays_alone() -> None:
    x = make(2, 2, 64, 64)
    clean = run(x)
    x["v"][0, 0] = math.nan
    for a, b in zip(run(x), clean, strict=True):
        assert bool(a[0, 0].isnan().all())
        assert torch.equal(a[0, 1], b[0, 1]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_allocated(dtype: torch.dtype) -> None:
    x = make(1, 8, 64, 64, dtype=dtype)
    out = torch.empty_like(x["v"])
    with torch.no_grad():
        memory_step(**x, out=out)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            for _ in range(10):
                memory_step(**x, out=out)
    found = profile.key_averages()
    assert sum(event.count for event in found if event.key == "mnemos::memory_step") == 10
    assert sum(max(event.self_cpu_memory_usage, 0) for event in found) == 0


def test_nothing_is_recorded_for_a_backward_pass() -> None:
    x = make()
    for name in NAMES[:6]:
        x[name].requires_grad_()
    assert not any(z.requires_grad for backend in ("auto", *BACKENDS) for z in run(x, backend))


def test_it_compiles() -> None:
    x = make(key_dim=32, value_dim=32)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert all(torch.equal(a, b) for a, b in zip(compiled(x), run(x), strict=True))


def test_opcheck() -> None:
    x = make(key_dim=32, value_dim=32)
    out = torch.empty_like(x["v"])
    for eta in (x["eta"], None):
        torch.library.opcheck(torch.ops.mnemos.memory_step.default, (*(x | {"eta": eta}).values(), out))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3)}, r"q has shape \[2, 3\]"),
        ({"k": torch.zeros(2, 3, 31)}, r"k has shape \[2, 3, 31\]; expected \[2, 3, 32\]"),
        ({"v": torch.zeros(2, 2, 48)}, r"v has shape \[2, 2, 48\]; expected \[2, 3, value dim\]"),
        ({"alpha": torch.zeros(2, 3, 1)}, r"alpha has shape"),
        ({"eta": torch.zeros(2, 3, dtype=torch.bfloat16)}, "eta is bfloat16; expected float64 or float32"),
        ({"theta": torch.zeros(3)}, r"theta has shape \[3\]"),
        ({"memory": torch.zeros(2, 3, 48, 32)}, r"memory has shape"),
        ({"momentum": torch.zeros(2, 3, 32, 48, dtype=torch.float64)}, "momentum is float64; expected float32"),
        ({"v": torch.zeros(2, 3, 48, dtype=torch.int64)}, "v is int64"),
        ({"out": torch.zeros(2, 3, 32)}, r"out has shape"),
        ({"backend": "tpu"}, "backend is 'tpu'"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_what_does_not_fit_is_named_and_changes_nothing(grad: bool, change: dict[str, object], message: str) -> None:
    x: dict[str, object] = {**make(), **change}
    before = [x[name].clone() for name in ("memory", "momentum")]
    with torch.set_grad_enabled(grad):
        run(make())
        with pytest.raises(ValueError, match=message):
            memory_step(**x)
    assert all(torch.equal(x[name], old) for name, old in zip(("memory", "momentum"), before, strict=True))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (make(dtype=torch.float64), "q is float64 .* expects float32 or bfloat16"),
        (make(key_dim=48), "q is float32 .* expects a key dim of 32, 64 or 128"),
        (make(value_dim=40), "v is float32 .* expects a value dim that is a multiple of 16"),
        (make() | {"v": torch.zeros(2, 3, 48, dtype=torch.bfloat16)}, "v is bfloat16 .* expects the dtype of q"),
        (make() | {"alpha": torch.zeros(2, 3, dtype=torch.float64)}, "alpha is float64 .* expects float32"),
    ],
)
def test_a_kernel_asked_for_by_name_refuses_what_it_does_not_take(x: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(x, "cpu")
    with pytest.raises(ValueError, match=r"q is .* expects a cuda tensor"):
        run(x, "cuda")
    assert_close(run(x), expected(x), 1e-2, 1e-2)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing was loaded, checked or said yet."""
    monkeypatch.setattr(native, "_checked", {})
    native.why_not.cache_clear()
    native.warn_once.cache_clear()
    yield
    native.why_not.cache_clear()
    native.warn_once.cache_clear()


def test_every_kernel_passes_its_check(fresh: None) -> None:
    for dtype in memory_step_native.DTYPES:
        for key_dim in memory_step_native.KEY_DIMS:
            assert memory_step_native.why_not("cpu", dtype, key_dim) is None
    found = list(native.kernel_checks())
    assert len(found) == 6
    assert all(0 < (check.error or 0) < (1e-6 if "float32" in check.case else 1e-2) for check in found)


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_a_broken_kernel_falls_back_with_one_warning(
    fresh: None, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    whole = torch.ops.mnemos.memory_step.default

    def broken(*arguments: Tensor) -> None:
        whole(*arguments)
        arguments[6].mul_(factor)

    monkeypatch.setattr(torch.ops, "mnemos", SimpleNamespace(memory_step=SimpleNamespace(default=broken)))
    x = make()
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match="memory_step is not used on cpu .* differ from PyTorch's by") as seen:
            actual = [run(x) for _ in range(3)][-1]
        assert len(seen) == 1
        assert all(torch.equal(a, b) for a, b in zip(actual, run(x, "torch"), strict=True))
        with pytest.raises(ValueError, match="backend 'cpu' cannot run"):
            run(x, "cpu")


def test_a_library_from_before_there_was_the_op_falls_back(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mnemos", SimpleNamespace())
    x = make()
    with pytest.warns(RuntimeWarning, match="the library is older than memory_step"):
        actual = run(x)
    assert all(torch.equal(a, b) for a, b in zip(actual, run(x, "torch"), strict=True))


def test_an_error_of_the_kernel_itself_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make()
    run(x)
    monkeypatch.setenv("MNEMOS_CPU_ISA", "mmx")
    with torch.no_grad(), pytest.raises(RuntimeError, match="MNEMOS_CPU_ISA is mmx"):
        run(x)
