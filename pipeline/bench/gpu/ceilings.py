"""The step `ceilings`: what the device reaches at most, measured with PyTorch's own copy and matrix product."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from pipeline.bench.kernel_timing import timed
from pipeline.host.hardware import on_gpu

ROUNDS = 5


@dataclass(frozen=True)
class Ceilings:
    """Bytes/s count what is read and what is written; FLOP/s count two per multiplication and addition."""

    copy: float
    """Bytes/s from memory to memory."""
    cached_copy: float
    """Bytes/s of a copy that the last-level cache holds."""
    bf16: float
    """FLOP/s of a square bfloat16 product."""
    tf32: float
    """FLOP/s of a square product of float32 numbers, in TF32 on a GPU."""


def measure(device: torch.device) -> Ceilings:
    """Medians of a few rounds; some seconds on a GPU."""
    large, side = (2**30, 8192) if device.type == "cuda" else (2**24, 512)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return Ceilings(
            copy=_copy(large, device),
            cached_copy=_copy(2**23 if device.type == "cuda" else 2**18, device, copies=100),
            bf16=_product(side, torch.bfloat16, device),
            tf32=_product(side, torch.float32, device),
        )
    finally:
        torch.set_float32_matmul_precision(before)


def _copy(size: int, device: torch.device, copies: int = 10) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def work() -> None:
        for _ in range(copies):
            target.copy_(source)

    if device.type == "cuda":
        # A small copy is done before the next can be launched one by one.
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return 2 * size * copies / _seconds(graph.replay, device, calls=1)
    return 2 * size * copies / _seconds(work, device, calls=1)


def _product(side: int, dtype: torch.dtype, device: torch.device) -> float:
    generator = torch.Generator(device).manual_seed(0)
    # Zeros would draw less power, and run faster than any real product.
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _seconds(partial(torch.mm, a, b, out=out), device, calls=5)


def _seconds(work: Callable[[], object], device: torch.device, calls: int) -> float:
    timed(work, calls, device)
    return statistics.median(timed(work, calls, device) for _ in range(ROUNDS))


if __name__ == "__main__":
    found = asdict(measure(torch.device("cuda" if on_gpu() else "cpu")))
    Path(sys.argv[1]).write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
