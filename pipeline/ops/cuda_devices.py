"""What a CUDA device can run, and whether it still runs anything.

A native kernel needs code for the device's architecture and shared memory for its blocks; docs/kernels.md has the table
that follows. After an illegal access nothing runs on a device any more, in this process.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

# Errors after which every later call on the device fails too, until the process ends (CUDA Runtime API, "CUDA Error
# types": "the process must be terminated and relaunched").
STICKY = (
    "an illegal memory access was encountered",
    "misaligned address",
    "an illegal instruction was encountered",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "hardware stack error",
    "device-side assert triggered",
    "unspecified launch failure",
    "the launch timed out and was terminated",
    "uncorrectable ECC error encountered",
)


def has_code(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a library that was built for some architectures, as TORCH_CUDA_ARCH_LIST spells them, has code for a
    device of a compute capability.

    Machine code runs on devices of its major version from its minor version on; with ``a`` on its own version alone.
    PTX is translated for any newer device. Source: CUDA C++ Programming Guide, "Compute Capabilities".
    """
    for name in architectures:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            continue
        built = (int(match[1]), int(match[2]))
        if built == capability:
            return True
        if match[3] == "a" or built > capability:
            continue
        if built[0] == capability[0] or (match[4] and not match[3]):
            return True
    return False


def obstacle(device: str, shared_memory: int, architectures: Sequence[str] | None) -> str | None:
    """None where a kernel can start on a device, ``cuda:INDEX``, else why it cannot. Nothing is launched.

    Args:
        shared_memory: bytes that the most demanding block of the kernel asks for.
        architectures: what the library was built for; None where that is not known.
    """
    found = torch.cuda.get_device_properties(torch.device(device))
    name = f"{found.name} (compute capability {found.major}.{found.minor})"
    if architectures is not None and not has_code((found.major, found.minor), architectures):
        return f"the library has no code for {name}: it was built for {', '.join(architectures)}"
    available = getattr(found, "shared_memory_per_block_optin", None)
    if available is not None and shared_memory > available:
        return f"it needs {shared_memory:,} bytes of shared memory per block, and {name} has {available:,}"
    return None


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured: what is called now is recorded, and nothing may wait for the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def fatal_error(device: str, error: BaseException | None = None) -> str | None:
    """None while a device, ``cuda:INDEX``, still computes, else the error after which nothing runs there.

    ``error``: what has just failed there, if anything did. Most errors, also of a kernel that cannot start, leave the
    device as it was.
    """
    if error is not None and any(sign in str(error) for sign in STICKY):
        return first_line(error)
    try:
        probe(device)
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as found:
        return first_line(found)
    return None


def probe(device: str) -> None:
    """Wait for a device, and compute one number there. Raises what earlier work has left, RuntimeError."""
    torch.cuda.synchronize(device)
    torch.ones(1, device=device).add_(1).item()


def first_line(error: BaseException) -> str:
    """The first line of an error's message; CUDA's go on with advice."""
    return (str(error).strip().splitlines() or [""])[0]
