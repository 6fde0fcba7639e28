"""The step `kernel times`: what every CUDA kernel of the memory op takes, by the profiler, beside its prediction."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.bench.contenders import prepare
from pipeline.bench.gpu.ceilings import measure
from pipeline.bench.kernel_memory import both_passes
from pipeline.bench.kernel_model import KERNELS, predict
from pipeline.bench.kernel_ops import Shape, parse_shape
from pipeline.host.hardware import on_gpu

CALLS = 3
OTHER = "other"
"""What PyTorch runs around the op: casts, the output's gradient."""
CLOCK = 1.75e9
"""Cycles per second of an H200 under load, where torch does not have it."""


def kernel_times(shape: Shape, dtype: str) -> dict[str, Any]:
    """Milliseconds per forward and backward pass: measured and predicted, by kernel, and of all that ran."""
    device = torch.device("cuda" if on_gpu() else "cpu")
    backend = device.type
    run = prepare("miras_scan", backend, shape, getattr(torch, dtype), device)
    both_passes(run)
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as record:
        for _ in range(CALLS):
            both_passes(run)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    measured = by_kernel((event.key, _own_ms(event, device) / CALLS) for event in record.key_averages())
    ceilings = measure(device)
    predicted = _predicted(shape, dtype, device, ceilings.copy, ceilings.cached_copy, ceilings.bf16)
    return {
        "shape": str(shape), "dtype": dtype, "ceilings": asdict(ceilings),
        "kernels": {name: {"measured_ms": ms, "predicted_ms": predicted.get(name)} for name, ms in measured.items()},
        "measured_ms": sum(ms for name, ms in measured.items() if name != OTHER),
        "other_ms": measured.get(OTHER, 0.0),
        "predicted_ms": sum(predicted.values()) if predicted else None,
    }  # fmt: skip


def _own_ms(event: Any, device: torch.device) -> float:
    return (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / 1e3


def by_kernel(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Adds up milliseconds of the profiler's names by kernel of the op; what is none of them is OTHER."""
    found: dict[str, float] = {}
    for name, ms in times:
        kernel = next((kernel for kernel, pattern in KERNELS.items() if re.search(pattern, name)), OTHER)
        found[kernel] = found.get(kernel, 0.0) + ms
    return found


def _predicted(
    shape: Shape, dtype: str, device: torch.device, copy: float, cached: float, flops: float
) -> dict[str, float]:
    """Milliseconds by kernel on a GPU; empty on a CPU, where other code runs."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    # Not every supported version of torch has the clock rate.
    clock = 1e3 * getattr(properties, "clock_rate", CLOCK / 1e3)
    estimates = predict(
        shape.batch, shape.tokens, shape.heads, shape.dim, shape.dim, dtype, bandwidth=copy, l2_bandwidth=cached,
        tensor_flops=flops, multiprocessors=properties.multi_processor_count, clock=clock,
    )  # fmt: skip
    return {name: 1e3 * estimate.seconds for name, estimate in estimates.items()}


if __name__ == "__main__":
    figures = kernel_times(parse_shape(sys.argv[2]), sys.argv[3])
    Path(sys.argv[1]).write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
