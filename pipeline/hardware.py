"""What a device can do at most, and how much of it is used."""

from __future__ import annotations

import os
import re
import resource
import sys

import torch

PEAK_TFLOPS = {
    # Dense bfloat16, from the vendors' data sheets; matched against the device's name, longest first.
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "GB300": 2500.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
}


def on_gpu() -> bool:
    """Whether this process computes on a GPU.

    DeepSpeed's launcher makes GPUs visible to a run that was started for the CPU, so visibility alone does not tell.
    """
    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()


def peak_flops(stated_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of this device at bfloat16, or the stated one; None where it is not known."""
    if stated_tflops is not None:
        return stated_tflops * 1e12
    if not on_gpu():
        return None
    name = torch.cuda.get_device_name()
    if re.search(r"\b(MIG|Laptop|D)\b", name):
        # A part of a device, or a slower one of the same name.
        return None
    for key in sorted(PEAK_TFLOPS, key=len, reverse=True):
        if re.search(rf"\b{key}\b", name):
            return PEAK_TFLOPS[key] * 1e12
    return None


def utilisation(tok_s: float, flops_per_token: float, devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation; None where the peak is unknown, or wrong (a figure above 1)."""
    if peak is None:
        return None
    share = tok_s * flops_per_token / (devices * peak)
    return share if share <= 1 else None


def peak_memory() -> int:
    """Most bytes this process has held: allocated on the GPU, or resident on a CPU."""
    if on_gpu():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
