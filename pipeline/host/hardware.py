"""What a device can do at most, and how much of it is used."""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.host.devices import Device, find_device


@dataclass(frozen=True)
class Roof:
    """The most that a device can do, and where the figures come from."""

    flops: float | None
    """FLOP/s of matrix products in the dtype that is measured; None where it is not known."""
    bandwidth: float | None
    """Bytes/s of memory."""
    source: str

    def seconds(self, flops: float, moved: float) -> float | None:
        """The least time that so many FLOPs and bytes can take (Williams et al., the roofline model, 2009)."""
        if self.flops is None or self.bandwidth is None:
            return None
        return max(flops / self.flops, moved / self.bandwidth)

    def higher(self, other: Roof) -> Roof:
        """The higher of two that were measured on the same device."""
        if self.flops is None or other.flops is None or self.bandwidth is None or other.bandwidth is None:
            return self
        return Roof(max(self.flops, other.flops), max(self.bandwidth, other.bandwidth), self.source)


def on_gpu() -> bool:
    """Whether this process computes on a GPU.

    DeepSpeed's launcher makes GPUs visible to a run that was started for the CPU, so visibility alone does not tell.
    """
    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()


def has_bf16() -> bool:
    """Whether this process's device multiplies bfloat16 matrices: GPUs of compute capability 8.0 and above, any CPU.

    On older GPUs torch emulates bfloat16, slowly, and says that it is supported.
    """
    return not on_gpu() or torch.cuda.is_bf16_supported(including_emulation=False)


def has_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has matrix units for bfloat16 (Intel AMX), as Linux says; they are about four times as fast as
    its float32."""
    try:
        return re.search(r"^flags\s*:.*\bamx_bf16\b", cpuinfo.read_text(), re.MULTILINE) is not None
    except OSError:
        return False


def choose_accelerator() -> None:
    """Tells DeepSpeed, which chooses when it is imported, to compute on the CPU where this process does.

    Without this it says on stdout that it found no GPU.
    """
    if not on_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def peak_flops(stated_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of this device at bfloat16 (float16 where it has none), or the stated one; None where unknown."""
    if stated_tflops is not None:
        return stated_tflops * 1e12
    device = this_device()
    return None if device is None else device.tflops * 1e12


def peak_bandwidth() -> float | None:
    """Peak bytes/s of this GPU's memory; None where it is not known."""
    device = this_device()
    return None if device is None else device.bandwidth * 1e9


def this_device() -> Device | None:
    """This process's GPU in the table of devices; None on a CPU and for an unknown device."""
    return find_device(torch.cuda.get_device_name()) if on_gpu() else None


def roof(dtype: torch.dtype) -> Roof:
    """The roof over matrix products in a dtype: data sheets for a GPU, measured now on a CPU.

    On a GPU float32 counts as TF32, half the rate of half precision: what its matrix units do with such numbers at
    most. Those without TF32 compute it elsewhere.
    """
    if on_gpu():
        peak = peak_flops()
        if peak is not None and dtype not in (torch.bfloat16, torch.float16):
            device = this_device()
            peak = device.float32 * 1e12 if device is not None and not device.has_bf16 else peak / 2
        return Roof(peak, peak_bandwidth(), "data sheet")
    return Roof(measured_flops(dtype), measured_bandwidth(), "measured: matrix product, triad")


def measured_flops(dtype: torch.dtype, size: int = 1536) -> float:
    """FLOP/s of a square matrix product on this CPU, with as many threads as torch uses now; the best of a few."""
    a, b = torch.rand(size, size).to(dtype), torch.rand(size, size).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out))


def measured_bandwidth(size: int = 2**24) -> float:
    """Bytes/s of a triad a = b + s c over 64 MiB vectors on this CPU (McCalpin, STREAM); the best of a few."""
    b, c = torch.rand(size), torch.rand(size)
    out = torch.empty_like(b)
    return 3 * b.nbytes / _best(lambda: torch.add(b, c, alpha=3.0, out=out))


def _best(work: Callable[[], object], repeats: int = 7) -> float:
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])


def utilisation(tok_s: float, flops_per_token: float, devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation; None where the peak is unknown, or wrong (a figure above 1)."""
    share = share_of_peak(tok_s, flops_per_token, devices, peak)
    return share if share is not None and share <= 1 else None


def share_of_peak(tok_s: float, flops_per_token: float, devices: int, peak: float | None) -> float | None:
    """As `utilisation`, whatever the figure is; None where the peak is unknown."""
    return None if peak is None else tok_s * flops_per_token / (devices * peak)


def peak_memory() -> int:
    """Most bytes this process has held: allocated on the GPU, or resident on a CPU."""
    if on_gpu():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
