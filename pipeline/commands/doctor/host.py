"""The facts of this machine: processor, memory, disk, GPUs, compilers, packages. None for what cannot be found."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.host.local import LocalHost


def host_facts(machine: LocalHost) -> dict[str, Any]:
    """Platform, processor, cores, memory and disk in bytes, and the NVIDIA driver."""
    memory = memory_free = None
    with contextlib.suppress(Exception):
        import psutil

        memory, memory_free = psutil.virtual_memory().total, psutil.virtual_memory().available
    disk_free = None
    with contextlib.suppress(OSError):
        disk_free = shutil.disk_usage(Path.cwd()).free
    driver = None
    with contextlib.suppress(OSError):
        match = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
        driver = f"NVIDIA {match[0]}" if match else None
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": machine.cores(),
        "amx": _has_amx(),
        "memory": memory,
        "memory_free": memory_free,
        "disk_free": disk_free,
        "driver": driver,
    }


def _cpu_model() -> str | None:
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine() or None


def _has_amx() -> bool | None:
    with contextlib.suppress(Exception):
        from pipeline.host.hardware import has_amx  # which imports torch

        return has_amx()
    return None


def installed_version(package: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_facts() -> dict[str, Any]:
    """What torch was built with; `error` when it does not load."""
    try:
        import torch

        nccl = None
        if torch.cuda.is_available():
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
        return {"cuda": torch.version.cuda, "nccl": nccl, "error": None}
    except Exception as error:  # a broken install fails in many ways, and the report must come anyway
        return {"cuda": None, "nccl": None, "error": f"{type(error).__name__}: {error}"}


def gpus() -> list[dict[str, Any]]:
    """The GPUs that torch can use: name, memory in bytes, compute capability, the precision that `auto` trains in, and
    the peak of it in TFLOP/s (None for one that is not in the table of devices)."""
    found = []
    with contextlib.suppress(Exception):
        import torch

        from pipeline.host.devices import find_device

        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            device = torch.cuda.get_device_properties(index)
            capability = f"{device.major}.{device.minor}"
            known = find_device(device.name)
            found.append(
                {
                    "name": device.name,
                    "memory": device.total_memory,
                    "capability": capability,
                    "precision": "bf16" if device.major >= 8 else "fp16" if device.major >= 7 else "fp32 alone",
                    "tflops": None if known is None else known.tflops,
                }
            )
    return found


def tools() -> dict[str, str | None]:
    """The first line of every tool's `--version`."""
    commands = {"c++ compiler": os.environ.get("CXX") or "c++", "nvcc": _nvcc(), "ninja": "ninja", "pdsh": "pdsh"}
    return {name: _first_line(command, "-V" if name == "pdsh" else "--version") for name, command in commands.items()}


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return str(Path(home) / "bin" / "nvcc") if home else "nvcc"


def _first_line(command: str, flag: str) -> str | None:
    # ninja is installed next to Python, which need not be on the PATH.
    path = shutil.which(command) or shutil.which(command, path=str(Path(sys.executable).parent))
    if path is None:
        return None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        answer = subprocess.run([path, flag], capture_output=True, text=True, timeout=20, check=False)
        lines = [line for line in answer.stdout.splitlines() if line.strip()]
        # nvcc prints its release in a later line.
        release = [line for line in lines if "release" in line]
        return (release or lines or [path])[0].strip()
    return path


def deepspeed_facts(machine: LocalHost, warnings: list[str]) -> dict[str, Any]:
    """The accelerator and the backend that DeepSpeed will take; appends to ``warnings`` why one cannot be found."""
    accelerator = "cpu"
    try:
        accelerator = "cuda" if machine.gpus() else "cpu"
    except UserError as error:
        warnings.append(str(error))
    return {
        "accelerator": accelerator,
        "backend": "nccl" if accelerator == "cuda" else "gloo",
    }
