"""The CUDA source of the memory step, run on the host, against the float64 token loop."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.memory_step_cases import BF16, FP32, NAMES, assert_close, expected, make

ROOT = Path(__file__).resolve().parents[2]
GUARD = 64
"""Elements around every tensor that no thread may touch."""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    assert compiler, "no C++ compiler"
    library = tmp_path_factory.mktemp("emulator") / "memory_step.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    source = Path(__file__).with_name("memory_step_emulator.cpp")
    command = [compiler, *flags, "-I", str(ROOT / "kernels"), str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = ctypes.CDLL(str(library))
    found.emulated_step.restype = ctypes.c_int64
    return found


def run(emulator: ctypes.CDLL, x: dict[str, Tensor | None], order: int = 0) -> tuple[list[Tensor], int]:
    """The read, both states after, and the blocks of the launch. NaNs surround every tensor, and stay there."""
    out = torch.full_like(x["v"], math.nan)
    tensors = [*(x[name] for name in NAMES), out]
    padded = [
        None if z is None else torch.nn.functional.pad(z.flatten(), (GUARD, GUARD), value=math.nan) for z in tensors
    ]
    inner = [None if z is None else z[GUARD:-GUARD] for z in padded]
    rows, heads, key_dim = x["q"].shape
    sizes = (ctypes.c_int64 * 5)(rows * heads, key_dim, out.shape[-1], out.dtype == torch.bfloat16, order)
    pointers = (ctypes.c_void_p * 9)(*(None if z is None else z.data_ptr() for z in inner))
    blocks = emulator.emulated_step(sizes, pointers)
    for z in padded:
        assert z is None or bool(torch.cat([z[:GUARD], z[-GUARD:]]).isnan().all())
    for before, z in zip(tensors[:6], inner[:6], strict=True):
        assert before is None or torch.equal(before.flatten(), z)
    after = [inner[8], inner[6], inner[7]]
    return [z.view(like.shape) for z, like in zip(after, (out, x["memory"], x["momentum"]), strict=True)], blocks


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key_dim", [32, 64, 128])
@pytest.mark.parametrize("value_dim", [16, 48, 64])
def test_a_step_equals_the_token_loop(
    emulator: ctypes.CDLL, value_dim: int, key_dim: int, dtype: torch.dtype, momentum: bool
) -> None:
    x = make(2, 3, key_dim, value_dim, dtype=dtype, momentum=momentum)
    actual, blocks = run(emulator, x)
    assert_close(actual, expected(x), BF16 if dtype == torch.bfloat16 else FP32)
    assert blocks == 6 * math.ceil(value_dim / 32)


@pytest.mark.parametrize("key_dim", [32, 128])
def test_the_order_of_the_threads_changes_no_bit(emulator: ctypes.CDLL, key_dim: int) -> None:
    x = make(2, 2, key_dim, 80)
    first, _ = run(emulator, x)
    for order in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(run(emulator, x, order)[0], first, strict=True))


def test_without_momentum_what_s_was_has_no_part(emulator: ctypes.CDLL) -> None:
    x = make(momentum=False)
    clean, _ = run(emulator, x)
    x["momentum"] = torch.full_like(x["momentum"], math.nan)
    assert all(torch.equal(a, b) for a, b in zip(run(emulator, x)[0], clean, strict=True))
