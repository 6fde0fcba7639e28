"""The step `versions`: the device, the driver and compilers, as torch and the tools report them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.gpu.packages import tool_version, versions


def describe() -> dict[str, Any]:
    """What this process computes on, and what with."""
    found: dict[str, Any] = {
        "versions": versions(),
        "cuda": torch.version.cuda,
        "nvcc": tool_version("nvcc") or tool_version("/usr/local/cuda/bin/nvcc"),
        "compute_sanitizer": tool_version("compute-sanitizer"),
        "c++": tool_version("c++"),
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        # torch 2.10 has it, and its stubs do not.
        shared = device.shared_memory_per_multiprocessor  # type: ignore[attr-defined, unused-ignore]
        found["device"] = {
            "name": device.name,
            "capability": f"{device.major}.{device.minor}",
            "memory": device.total_memory,
            "multiprocessors": device.multi_processor_count,
            "shared_memory_per_multiprocessor": shared,
            "l2": device.L2_cache_size,
        }
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["cudnn"] = torch.backends.cudnn.version()
    return found


if __name__ == "__main__":
    facts = describe()
    Path(sys.argv[1]).write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))
