"""The CUDA sources of miras_scan, run by an emulator of thread blocks, equal the float64 token loop and the mirror."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.bench import kernel_model
from pipeline.ops import scan_native
from tests.kernels.emulated import Emulated, build, compiler
from tests.kernels.miras_scan_tiles import Tiles
from tests.ops.scan_cases import NAMES, assert_close, gradients, make, segments, truth

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ to compile the CUDA sources for the emulator")

ALL = ("y", "M", "S", *NAMES)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Between the mirror and the sources: order of sums and truncation. In bfloat16 that moves a value over a rounding's
# edge here and there.
MIRROR = {torch.float32: 5e-6, torch.bfloat16: 1e-3}

SHAPES = [
    # tokens, key dim, value dim, where segments start
    pytest.param(1, 32, 16, (), id="1 token"),
    pytest.param(63, 64, 16, (), id="63 tokens"),
    pytest.param(63, 64, 16, (1, 62), id="63 tokens in segments"),
    pytest.param(65, 128, 48, (), id="65 tokens"),
    pytest.param(65, 128, 48, (7, 64), id="65 tokens in segments"),
    pytest.param(200, 32, 96, (), id="200 tokens"),
    pytest.param(200, 32, 96, (15, 16, 63, 65, 128), id="200 tokens in segments"),
    pytest.param(130, 64, 80, (63, 64, 65), id="130 tokens in segments"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    folder = tmp_path_factory.mktemp("emulated")
    sources = ("emulator.cpp", "miras_scan.cpp")
    return Emulated(build(folder / "miras_scan.so", sources, "-O2", "-fPIC", "-shared"))


def inputs(
    dtype: torch.dtype,
    tokens: int,
    key_dim: int,
    value_dim: int,
    *,
    gates: str = "model",
    batch: int = 1,
    seed: int = 0,
) -> list[Tensor]:
    x = [z.detach() for z in make(batch, tokens, 2, key_dim, value_dim, gates=gates, dtype=torch.float32, seed=seed)]
    return [z.to(dtype).requires_grad_() for z in x[:3]] + [z.requires_grad_() for z in x[3:]]


def starts_of(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else F.pad(ids[:, 1:] != ids[:, :-1], (1, 0))


def cotangents(x: list[Tensor]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    shapes = (x[2], x[6], x[7])
    return [torch.randn(z.shape, generator=rng, dtype=torch.float64).to(z.dtype) for z in shapes]


def both(emulated: Emulated, x: list[Tensor], resets: Tensor | None, **options) -> list[Tensor]:
    """y, M, S and all gradients under `cotangents`."""
    y, memory, momentum, residuals, states = emulated.forward(x, resets, **options)
    grads = emulated.backward(x, resets, cotangents(x), residuals, states, **options)
    return [y, memory, momentum, *grads]


def exact(x: list[Tensor], ids: Tensor | None) -> list[Tensor]:
    expected = truth(x, ids)
    return expected + gradients(expected, x)


def mirrored(x: list[Tensor], resets: Tensor | None) -> list[Tensor]:
    tiles = Tiles(*(z.detach() for z in x), resets)
    return [*tiles.forward(), *tiles.backward(*cotangents(x))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "key_dim", "value_dim", "starts"), SHAPES)
def test_values_and_gradients(
    emulated: Emulated, tokens: int, key_dim: int, value_dim: int, starts: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = inputs(dtype, tokens, key_dim, value_dim, seed=tokens)
    ids = segments(1, tokens, starts) if starts else None
    actual = both(emulated, x, starts_of(ids))
    assert [z.dtype for z in actual] == [dtype, *[torch.float32] * 2, *[dtype] * 3, *[torch.float32] * 5]
    assert_close(actual, exact(x, ids), ALL, TOLERANCE[dtype])
    assert_close(actual, mirrored(x, starts_of(ids)), ALL, MIRROR[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_at_the_ends_of_their_range(emulated: Emulated, dtype: torch.dtype) -> None:
    x = inputs(dtype, 100, 32, 32, gates="any", batch=2)
    assert_close(both(emulated, x, None), exact(x, None), ALL, TOLERANCE[dtype])


@pytest.mark.parametrize("starts", [(64,), (32, 64), tuple(range(1, 100))], ids=["border", "borders", "every token"])
def test_segments_that_start_with_a_chunk(emulated: Emulated, starts: tuple[int, ...]) -> None:
    x = inputs(torch.float32, 100, 32, 16, batch=2)
    ids = segments(2, 100, starts)
    actual = both(emulated, x, starts_of(ids))
    assert_close(actual, exact(x, ids), ALL, TOLERANCE[torch.float32])
    ends = {"M0": actual[-2], "S0": actual[-1]}
    assert all(not torch.isnan(z).any() for z in ends.values())


def test_repeated_keys_in_bfloat16(emulated: Emulated) -> None:
    x = inputs(torch.bfloat16, 300, 64, 32)
    rng = torch.Generator().manual_seed(2)
    pool = F.normalize(torch.randn(4, 64, generator=rng), dim=-1).bfloat16()
    x[1] = pool[torch.randint(4, (1, 300, 2), generator=rng)].requires_grad_()
    assert_close(both(emulated, x, None), exact(x, None), ALL, 3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(32, 16), (64, 48), (128, 80)])
def test_the_order_of_the_threads_changes_no_bit(
    emulated: Emulated, key_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    """A barrier that is missing between a write and a read shows here.

    At interval 192 two chunks are replayed one after the other, in the buffers of the first.
    """
    x = inputs(dtype, 140, key_dim, value_dim)
    resets = starts_of(segments(1, 140, (30, 90)))
    expected = both(emulated, x, resets)
    for order, interval in ((1, 64), (1, 192), (2, 192)):
        for name, a, b in zip(ALL, both(emulated, x, resets, order=order, interval=interval), expected, strict=True):
            assert torch.equal(a, b), f"{name}, order {order}, interval {interval}"


@pytest.mark.parametrize("interval", [64, 128, 192])
@pytest.mark.parametrize("spans", [False, True], ids=["one span", "spans"])
def test_spans_and_kept_states_change_no_bit(emulated: Emulated, interval: int, spans: bool) -> None:
    x = inputs(torch.bfloat16, 330, 32, 32)
    resets = starts_of(segments(1, 330, (100, 192)))
    expected = both(emulated, x, resets)
    actual = both(emulated, x, resets, interval=interval, workspace=1 if spans else 2**30)
    for name, a, b in zip(ALL, actual, expected, strict=True):
        assert torch.equal(a, b), name
    _, _, _, _, states = emulated.forward(x, resets, interval=interval)
    _, _, _, _, every = emulated.forward(x, resets)
    assert torch.equal(states, every[:, :, :: interval // 64])
    for save in (True, False):
        outputs = emulated.forward(x, resets, interval=interval, save=save, workspace=1 if spans else 2**30)
        for a, b in zip(outputs[:3], expected[:3], strict=True):
            assert torch.equal(a, b)


def test_the_shared_memory_that_is_asked_for_is_what_python_says(emulated: Emulated) -> None:
    for dtype, sizes in scan_native.SHARED_MEMORY.items():
        for key_dim, size in sizes.items():
            passes = [emulated.shared_memory(dtype, key_dim, backward=backward) for backward in (False, True)]
            assert max(passes) == size, (dtype, key_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(32, 48), (64, 64), (128, 80)])
def test_the_tensor_instructions_are_those_of_the_model(
    emulated: Emulated, key_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    """Two rows of two whole chunks, of which the replay advances over one."""
    kernels = ("prepare", "states", "outputs", "replay", "adjoint", "gradients")
    for name in kernels:
        emulated.instructions(name)
    x = inputs(dtype, 128, key_dim, value_dim)
    y, memory, momentum, residuals, states = emulated.forward(x, None, interval=128)
    counted = {f"{name}, forward" if name == "prepare" else name: emulated.instructions(name) for name in kernels[:3]}
    emulated.backward(x, None, [torch.ones_like(z) for z in (y, memory, momentum)], residuals, states, interval=128)
    names = ("prepare", *kernels[3:])
    counted |= {f"{name}, backward" if name == "prepare" else name: emulated.instructions(name) for name in names}
    expected = kernel_model.instructions(key_dim, value_dim, str(dtype).removeprefix("torch."))
    assert counted == {name: count * (2 if name == "replay" else 4) for name, count in expected.items()}


def test_the_emulator_shows_a_missing_barrier(emulated: Emulated) -> None:
    sums = emulated.library.emulated_sum
    sums.restype = ctypes.c_float
    orders = (0, 1, 2)
    assert [sums(ctypes.c_bool(True), order) for order in orders] == [2016.0] * 3
    assert any(math.isnan(sums(ctypes.c_bool(False), order)) for order in orders)


def test_the_emulator_shows_a_copy_of_memory_that_nothing_has_written(emulated: Emulated) -> None:
    """Whether or not the copy is used: compute-sanitizer's initcheck would report it on a device."""
    call = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).emulated_copy(ctypes.c_bool(sys.argv[2] == 'all'))"
    for written in ("all", "some"):
        command = [sys.executable, "-c", call, emulated.library._name, written]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode == 0) == (written == "all"), done.stderr
        assert ("reads global memory that nothing has written" in done.stderr) == (written == "some")


@pytest.mark.parametrize(
    "sanitizers", ["address", pytest.param("address,undefined", marks=pytest.mark.slow)], ids=["address", "both"]
)
def test_nothing_is_out_of_bounds_or_undefined(sanitizers: str, tmp_path: Path) -> None:
    flags = ("-Og", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
    program = build(tmp_path / "sanitized", ("emulator.cpp", "miras_scan.cpp", "miras_scan_main.cpp"), *flags)
    # Threads of a block never return, so what they hold would be called a leak.
    options = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False, env=options)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
