"""The native kernels are loaded, checked and chosen as documented, and torch knows their shapes and gradients."""

from __future__ import annotations

import functools
import math
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from pipeline.ops import affine_scan_native, native, scan, scan_native
from pipeline.ops.affine_scan import affine_scan
from tests.ops.saved import saved_by
from tests.ops.scan_cases import NAMES, assert_close, gradients, make, run, segments

OPS = torch.ops.mnemos
HERE = [kind for kind in native.KINDS if native.load(kind)]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which nothing was loaded, checked or said yet. What torch knows of the ops stays."""
    monkeypatch.setattr(native, "_checked", {})
    native.why_not.cache_clear()
    native.warn_once.cache_clear()
    yield
    native.why_not.cache_clear()
    native.warn_once.cache_clear()


def floats(batch: int = 2, sequence: int = 70, key_dim: int = 32, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Inputs that the kernels take, on the model's gates."""
    x = [z.detach() for z in make(batch, sequence, 2, key_dim, key_dim, gates="model", dtype=torch.float32)]
    x[:3] = [z.to(dtype) for z in x[:3]]
    return [z.requires_grad_() for z in x]


def op_arguments(dtype: torch.dtype, resets: bool, save: bool, interval: int = 32) -> tuple:
    """Arguments of ``mnemos::miras_scan``, which need gradients where the op keeps what those take."""
    x = [z.detach().requires_grad_(save) for z in floats(dtype=dtype)]
    starts = torch.zeros(2, 70, dtype=torch.bool)
    starts[1, 30] = True
    return (*x, starts if resets else None, interval, save)


def test_the_library_for_the_cpu_loads_wherever_there_is_a_compiler() -> None:
    mode = native.build_report().get("mode")
    if mode == "off" or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        assert native.why_not("cpu") is not None
    else:
        assert native.why_not("cpu") is None


@pytest.mark.parametrize("kind", HERE)
def test_kernels_pass_their_check_at_first_use(fresh: None, kind: str) -> None:
    device = "cpu" if kind == "cpu" else "cuda:0"
    for dtype in scan_native.DTYPES:
        for key_dim in scan_native.KEY_DIMS:
            assert scan_native.why_not(device, dtype, key_dim) is None
    found = list(native.kernel_checks())
    assert len(found) == 6
    assert {check.device for check in found} == {device}
    assert all(0 < check.error < 1e-5 for check in found if "float32" in check.case)
    assert all(0 < check.error < 1e-2 for check in found)


def test_a_library_that_is_not_there_is_named_with_the_reason(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    assert native.why_not("cpu") == "it is not built: run ./launch.sh --setup-only"
    native.why_not.cache_clear()
    (tmp_path / "_native_build.json").write_text(
        '{"libraries": {"cpu": {"built": false, "reason": "no C++ compiler"}}}'
    )
    assert native.why_not("cpu") == "it is not built (no C++ compiler)"
    x = floats()
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run: it is not built \(no C\+\+ compiler\)"):
        run(x, backend="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        automatic = run(x)
    for a, b in zip(automatic, run(x, backend="torch"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("text", ["", "[]", "not JSON"])
def test_a_damaged_build_report_is_no_report(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    (tmp_path / "_native_build.json").write_text(text)
    assert native.build_report() == {}
    assert not native.load("cpu")


def test_a_damaged_library_is_a_reason_and_no_crash(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    (tmp_path / "_native_cpu.abi3.so").write_bytes(b"not a library")
    assert re.match(r"_native_cpu.abi3.so does not load \(.+\): run", native.why_not("cpu") or "")


def test_a_library_for_gpus_waits_for_one(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    (tmp_path / "_native_cuda.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert native.why_not("cuda") == "this torch is built for the CPU alone"
    native.why_not.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native.why_not("cuda") == "torch sees no GPU here"
    native.why_not.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "it needs the library for the CPU" in (native.why_not("cuda") or "")


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize("dtype", scan_native.DTYPES, ids=str)
def test_opcheck_forward(dtype: torch.dtype, resets: bool, save: bool) -> None:
    torch.library.opcheck(OPS.miras_scan, op_arguments(dtype, resets, save))


@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize("dtype", scan_native.DTYPES, ids=str)
def test_opcheck_backward(dtype: torch.dtype, resets: bool) -> None:
    x = [z.detach() if isinstance(z, Tensor) else z for z in op_arguments(dtype, resets, True)]
    y, memory, momentum, residuals, states = OPS.miras_scan(*x)
    cotangents = (torch.ones_like(y), torch.ones_like(memory), torch.ones_like(momentum))
    torch.library.opcheck(OPS.miras_scan_backward, (*cotangents, *x[:6], x[8], residuals, states, x[9]))


def test_shapes_are_known_without_data() -> None:
    x = [z.to("meta") if isinstance(z, Tensor) else z for z in op_arguments(torch.bfloat16, True, True)]
    y, memory, momentum, residuals, states = OPS.miras_scan(*x)
    assert (y.shape, y.dtype) == ((2, 70, 2, 32), torch.bfloat16)
    assert (residuals.shape, residuals.dtype) == ((2, 2, 70, 32), torch.float32)
    assert states.shape == (2, 2, 3, 2, 32, 32)
    gradient = OPS.miras_scan_backward(y, memory, momentum, *x[:6], x[8], residuals, states, 32)
    assert [(z.shape, z.dtype) for z in gradient] == [(z.shape, z.dtype) for z in x[:8]]
    assert [z.numel() for z in OPS.miras_scan(*x[:10], False)[3:]] == [0, 0]


@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_is_eager(compiler: str, segmented: bool) -> None:
    """The same bits, first use inside the graph included, and no variant beyond one per kind of length."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for sequence in (100, 70, 200, 300, 100, 129):
        x = floats(sequence=sequence)
        ids = segments(2, sequence, (30, 65)) if segmented else None
        actual, expected = compiled(x, segment_ids=ids), run(x, segment_ids=ids)
        for a, b in zip((*actual, *gradients(actual, x)), (*expected, *gradients(expected, x)), strict=True):
            assert torch.equal(a, b)
    # One for the first length, and one for all others.
    assert counter.frame_count <= 2


def test_the_first_use_may_be_compiled(fresh: None) -> None:
    torch._dynamo.reset()
    x = floats()
    compiled = torch.compile(lambda *z: run(z), fullgraph=True, backend="aot_eager")(*x)
    assert [check.device for check in native.kernel_checks()] == ["cpu"]
    for a, b in zip(compiled, run(x, backend="cpu"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("around", ["checkpoint", "inference", "autocast", "no_grad", "hooks"])
def test_the_check_at_first_use_is_not_seen_by_what_is_around_it(fresh: None, around: str) -> None:
    x = floats(key_dim=64)
    packed: list[Tensor] = []
    if around == "checkpoint":
        # It counts what is saved, forward and again.
        outputs = checkpoint(lambda *z: tuple(run(z)), *x, use_reentrant=False)
        gradients(outputs, x)
    elif around == "inference":
        with torch.inference_mode():
            run(x)
    elif around == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(x)
    elif around == "no_grad":
        with torch.no_grad():
            run(x)
    else:
        with torch.autograd.graph.saved_tensors_hooks(lambda z: packed.append(z) or z, lambda z: z):
            run(x)
        assert len(packed) == 8, "q, k, v, the gates, residuals and states"
    (check,) = native.kernel_checks()
    assert check.failure is None
    assert check.error < 1e-5


def test_random_numbers_do_not_depend_on_the_check(fresh: None) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(floats())
    assert torch.equal(torch.rand(3), expected)


def wrong_values(*arguments) -> tuple[Tensor, ...]:
    y, *rest = OPS.miras_scan(*arguments)
    return 1.01 * y, *rest


def not_a_number(*arguments) -> tuple[Tensor, ...]:
    y, *rest = OPS.miras_scan(*arguments)
    return y, rest[0] * math.nan, *rest[1:]


def crash(*arguments) -> tuple[Tensor, ...]:
    raise RuntimeError("no kernel image is available for execution on the device\nmore lines")


class Broken:
    """The ops, one of them replaced."""

    def __init__(self, **replaced: Callable[..., tuple[Tensor, ...]]) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> object:
        return getattr(OPS, name)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (wrong_values, r"its results differ from PyTorch's by 1\.0e-02, more than 1e-04"),
        (not_a_number, "its results differ from PyTorch's by nan"),
        (crash, "it fails with RuntimeError: no kernel image is available for execution on the device"),
    ],
)
def test_a_broken_kernel_falls_back_with_one_warning(
    fresh: None, monkeypatch: pytest.MonkeyPatch, op: Callable[..., tuple[Tensor, ...]], message: str
) -> None:
    """What a compiler's wrong code would do: values that are off, no numbers, or an error."""
    x = floats()
    monkeypatch.setattr(torch.ops, "mnemos", Broken(miras_scan=op))
    warning = r"miras_scan is not used on cpu \(float32, key dim 32\): " + message
    with pytest.warns(RuntimeWarning, match=warning) as seen:
        outputs = [run(x) for _ in range(3)][-1]
    assert len(seen) == 1
    for a, b in zip(outputs, run(x, backend="torch"), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="backend 'cpu' cannot run: " + message):
        run(x, backend="cpu")
    (check,) = native.kernel_checks()
    assert re.match(message, check.failure or "")


@pytest.mark.parametrize("op", ["miras_scan", "affine_scan"])
def test_a_library_from_before_there_was_an_op_falls_back(
    fresh: None, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    x = floats()
    a, b = torch.rand(1, 5, 3), torch.rand(1, 5, 3)

    def call(backend: str) -> list[Tensor]:
        return run(x, backend=backend) if op == "miras_scan" else list(affine_scan(a, b, backend=backend))

    monkeypatch.setattr(torch.ops, "mnemos", SimpleNamespace())
    with pytest.warns(RuntimeWarning, match=rf"{op} is not used on cpu .*: the library is older than {op}: run"):
        outputs = call("auto")
    for actual, expected in zip(outputs, call("torch"), strict=True):
        assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match=f"backend 'cpu' cannot run: the library is older than {op}"):
        call("cpu")


@pytest.mark.parametrize("module", [scan_native, affine_scan_native])
def test_threads_that_come_first_at_once_register_and_check_once(
    fresh: None, monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    calls: list[str] = []

    def slow(name: str) -> float:
        calls.append(name)
        time.sleep(0.02)
        return 0.0

    monkeypatch.setattr(module, "_register", functools.cache(lambda: slow("register")))
    check = "self_check" if module is scan_native else "_largest_error"
    monkeypatch.setattr(module, check, lambda *_: slow("check"))
    start = threading.Barrier(8)
    last = 32 if module is scan_native else torch.float32

    def first_use() -> None:
        start.wait()
        module.why_not("cpu", torch.float32, last)

    threads = [threading.Thread(target=first_use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["register", "check"]


def test_a_broken_gradient_is_found_too(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_gradient(*arguments) -> tuple[Tensor, ...]:
        *rest, last = OPS.miras_scan_backward(*arguments)
        return *rest, last.roll(1, dims=-1)

    monkeypatch.setattr(torch.ops, "mnemos", Broken(miras_scan_backward=wrong_gradient))
    with pytest.warns(RuntimeWarning, match="miras_scan is not used on cpu"):
        run(floats())


def test_a_kernel_is_checked_once(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = scan_native.self_check
    monkeypatch.setattr(scan_native, "self_check", lambda *a: calls.append(a) or real(*a))
    for _ in range(2):
        for dtype in scan_native.DTYPES:
            run(floats(dtype=dtype))
            run(floats(dtype=dtype), backend="cpu")
    assert calls == [("cpu", dtype, 32) for dtype in scan_native.DTYPES]


def test_auto_takes_the_kernel_where_it_fits_and_torch_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def note(module: ModuleType, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *x, **options: taken.append(name) or real(*x, **options))

    note(scan, "scan_torch")
    note(scan_native, "scan_native")

    def path(x: list[Tensor], **options) -> str:
        taken.clear()
        run([z.detach() for z in x], **options)
        (name,) = taken
        return name

    for dtype in scan_native.DTYPES:
        for key_dim in scan_native.KEY_DIMS:
            assert path(floats(1, 3, key_dim, dtype)) == "scan_native"
    assert path(floats(), rule="delta") == "scan_native"
    assert path(floats(), backend="torch") == "scan_torch"
    wide = make(1, 3, 1, 32, 96, dtype=torch.float32)
    assert path(wide) == "scan_native"
    assert path(make(1, 3, 1, 32, 24, dtype=torch.float32)) == "scan_torch"
    assert path(make(1, 3, 1, 48, 32, dtype=torch.float32)) == "scan_torch"
    assert path(make(1, 3, 1, 32, 32, dtype=torch.float64)) == "scan_torch"
    assert path([floats()[0].bfloat16(), *floats()[1:]]) == "scan_torch"
    assert path([*floats()[:3], floats()[3].double(), *floats()[4:]]) == "scan_torch"


def test_what_a_call_keeps_is_what_it_says() -> None:
    for dtype in scan_native.DTYPES:
        for key_dim in (32, 128):
            x = floats(2, 300, key_dim, dtype)
            outputs, total = saved_by(lambda x=x: run(x))
            assert outputs[0].requires_grad
            assert total == scan_native.kept_bytes(4, 300, key_dim, key_dim, dtype)


def test_nothing_is_kept_where_nothing_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[bool] = []

    def spy(*arguments) -> tuple[Tensor, ...]:
        saved.append(arguments[-1])
        return OPS.miras_scan(*arguments)

    x = floats()
    run(x)
    monkeypatch.setattr(torch.ops, "mnemos", Broken(miras_scan=spy))
    run(x)
    run([z.detach() for z in x])
    with torch.no_grad():
        run(x)
    run([*(z.detach() for z in x[:7]), x[7]])
    assert saved == [True, False, False, True]


def test_a_gradient_of_what_was_not_kept_is_refused() -> None:
    arguments = op_arguments(torch.float32, False, True)
    y, *_ = OPS.miras_scan(*arguments[:-1], False)
    with pytest.raises(RuntimeError, match="save=False"):
        y.sum().backward()


def test_a_second_derivative_is_refused() -> None:
    x = floats()
    y = run(x)[0]
    (first,) = torch.autograd.grad(y.square().sum(), x[2], create_graph=True)
    with pytest.raises(RuntimeError, match="miras_scan is differentiable once"):
        first.sum().backward()


def test_outputs_that_nothing_depends_on_have_no_gradient() -> None:
    x = floats()
    y, memory, momentum = run(x)
    from_y = torch.autograd.grad(y.sum(), x, retain_graph=True)
    from_memory = torch.autograd.grad(memory.sum(), x[1:], retain_graph=True)
    from_momentum = torch.autograd.grad(momentum.sum(), x[1:], retain_graph=True)
    together = torch.autograd.grad(y.sum() + memory.sum() + momentum.sum(), x)
    for name, whole, *parts in zip(NAMES[1:], together[1:], from_y[1:], from_memory, from_momentum, strict=True):
        assert torch.allclose(sum(parts), whole, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("cotangent", ["expanded", "transposed"])
def test_a_cotangent_of_any_layout(cotangent: str) -> None:
    x = floats()
    y = run(x)[0]
    given = torch.ones(()).expand(y.shape) if cotangent == "expanded" else torch.rand(2, 70, 32, 2).mT
    expected = torch.autograd.grad(y, x, given.contiguous(), retain_graph=True)
    for a, b in zip(torch.autograd.grad(y, x, given), expected, strict=True):
        assert torch.equal(a, b)


def test_the_interval_of_kept_states_keeps_them_small() -> None:
    for dtype in scan_native.DTYPES:
        for dim in scan_native.KEY_DIMS:
            every = scan_native.interval(dim, dtype)
            assert every % 64 == 0
            states, inputs_and_y = 8 * dim * dim / every, 4 * dim * dtype.itemsize
            assert states <= inputs_and_y / (2 if dtype == torch.float32 else 4) or every == 64


def test_intervals_do_not_change_the_result() -> None:
    arguments = [z.detach() if isinstance(z, Tensor) else z for z in op_arguments(torch.float32, True, True)]
    results = []
    for interval in (32, 64, 128):
        y, memory, momentum, residuals, states = OPS.miras_scan(*arguments[:9], interval, True)
        grads = OPS.miras_scan_backward(y, memory, momentum, *arguments[:6], arguments[8], residuals, states, interval)
        results.append([y, memory, momentum, *grads])
    for other in results[1:]:
        assert_close(other, results[0], ("y", "M", "S", *NAMES), 1e-6)


def test_verdicts_of_other_ops_go_by_the_same_rules(fresh: None) -> None:
    seen: list[int] = []
    for _ in range(2):
        assert native.verify("op", "cpu", "case", lambda: seen.append(1) or 1e-7, 1e-5) is None
    assert len(seen) == 1
    assert native.verify("op", "cpu", "another case", lambda: 1e-3, 1e-5) is not None
    assert native.verify("other", "cpu", "case", lambda: math.nan, 1e-5) is not None
    assert [check.error for check in native.kernel_checks()] == [1e-7, 1e-3, None]
