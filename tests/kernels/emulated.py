"""kernels/miras_scan/cuda compiled by g++ for the emulator, with torch tensors in and out."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests" / "kernels" / "emulator"
FLAGS = (
    *("-std=c++17", "-DMNEMOS_EMULATOR", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *(f"-I{ROOT / 'kernels'}", f"-I{EMULATOR}"),
)


def compiler() -> str | None:
    return shutil.which("g++")


def build(output: Path, sources: Sequence[str], *flags: str) -> Path:
    command = ["g++", *FLAGS, *flags, *(str(EMULATOR / source) for source in sources), "-o", str(output)]
    subprocess.run(command, check=True, timeout=300)
    return output


class Emulated:
    """The two launch programs. ``order``: 0 runs a block's first thread first, 1 its last, more at random."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulator_instructions.restype = ctypes.c_int64

    def shared_memory(self, dtype: torch.dtype, key_dim: int, *, backward: bool) -> int:
        """Bytes of the most demanding block of a pass."""
        return self.library.emulated_shared_memory(dtype == torch.bfloat16, key_dim, backward)

    def instructions(self, kernel: str) -> int:
        """The tensor instructions of all warps of a kernel since this was asked last."""
        return self.library.emulator_instructions(kernel.encode())

    def forward(
        self,
        x: Sequence[Tensor],
        resets: Tensor | None,
        *,
        interval: int = 64,
        save: bool = True,
        workspace: int = 2**30,
        order: int = 0,
    ) -> list[Tensor]:
        """From q, k, v, the gates, memory, momentum: y, the state after, and where save residuals and states."""
        q, k, v, alpha, eta, theta, memory, momentum = (z.detach().contiguous() for z in x)
        batch, tokens, heads, key_dim = q.shape
        outputs = [torch.empty_like(v), torch.empty_like(memory), torch.empty_like(momentum)]
        if save:
            outputs.append(torch.empty(batch, heads, tokens, v.shape[-1]))
            outputs.append(torch.empty(batch, heads, -(-tokens // interval), 2, key_dim, v.shape[-1]))
        self.library.emulator_set_order(order)
        pointers = _pointers([q, k, v, alpha, eta, theta, resets, memory, momentum, *outputs])
        self.library.emulated_forward(
            ctypes.c_bool(q.dtype == torch.bfloat16),
            _shape(q, v),
            ctypes.c_int(interval),
            ctypes.c_bool(save),
            ctypes.c_int64(workspace),
            pointers,
        )
        return outputs

    def backward(
        self,
        x: Sequence[Tensor],
        resets: Tensor | None,
        cotangents: Sequence[Tensor],
        residuals: Tensor,
        states: Tensor,
        *,
        interval: int = 64,
        workspace: int = 2**30,
        order: int = 0,
    ) -> list[Tensor]:
        """Gradients of everything in ``x``, from those of y, memory and momentum."""
        q, k, v, alpha, eta, theta, _, _ = (z.detach().contiguous() for z in x)
        grads = [torch.empty_like(z) for z in x]
        self.library.emulator_set_order(order)
        pointers = _pointers([*cotangents, q, k, alpha, eta, theta, resets, residuals, states, *grads])
        self.library.emulated_backward(
            ctypes.c_bool(q.dtype == torch.bfloat16),
            _shape(q, v),
            ctypes.c_int(interval),
            ctypes.c_int64(workspace),
            pointers,
        )
        return grads


def _shape(q: Tensor, v: Tensor) -> ctypes.Array:
    return (ctypes.c_int * 5)(*q.shape, v.shape[-1])


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    assert all(x is None or x.is_contiguous() for x in tensors)
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))
