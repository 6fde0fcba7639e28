"""The native libraries that setup.py builds from kernels/: loading them, and checking them before they are trusted.

Nothing happens at import. `load` opens a library at its first use; `verify` runs a kernel once against its PyTorch
path, because compilers have shipped wrong binaries for new devices. Both remember their answer for the process.

A kernel that fails its check is not used, and PyTorch takes its place. One that leaves its GPU unable to run anything,
PyTorch included, ends the run with a `DeviceLostError`: there is no path to fall back to.
"""

from __future__ import annotations

import functools
import json
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pipeline.errors import DeviceLostError
from pipeline.host.package import PACKAGE, how_to_set_up
from pipeline.ops import cuda_devices

Kind = Literal["cpu", "cuda"]
KINDS: tuple[Kind, ...] = ("cpu", "cuda")


class KernelCheck(NamedTuple):
    """What the check of one kernel found."""

    op: str
    device: str
    case: str  # what else a binary depends on: "float32, head size 64"
    error: float | None  # the largest relative RMSE of a result; None where it did not run
    failure: str | None  # why the kernel is not used; None where it is
    lost: str | None = None  # the error after which nothing runs on the device any more


# Two threads may be the first to use a kernel at the same time: held while its op is registered and checked.
LOCK = threading.RLock()

# Filled by `verify`, `lacks` and `refusal`; a process's own, never saved.
_checked: dict[tuple[str, str, str], KernelCheck] = {}


def library(kind: Kind) -> Path | None:
    """The built library, loaded or not."""
    return next(iter(sorted(PACKAGE.glob(f"_native_{kind}*.so"))), None)


def build_report() -> dict[str, Any]:
    """What setup.py wrote about its build: ``mode``, ``libraries`` by kind, ``warning``. Empty where there is none."""
    try:
        report = json.loads((PACKAGE / "_native_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def load(kind: Kind) -> bool:
    """Open the library of a kind, once; False where that cannot be, and `why_not` says why."""
    return why_not(kind) is None


@functools.cache
def why_not(kind: Kind) -> str | None:
    """None once the library of a kind is loaded (which this does), else the reason why it is not."""
    path = library(kind)
    if path is None:
        facts = build_report().get("libraries", {}).get(kind, {})
        reason = facts.get("reason") or ("no nvcc was found" if facts.get("no_tool") else None)
        return f"it is not built ({reason})" if reason else f"it is not built: {how_to_set_up()}"
    if kind == "cuda":
        if torch.version.cuda is None:
            return "this torch is built for the CPU alone"
        if not torch.cuda.is_available():
            return "torch sees no GPU here"
        # The schemas of all ops are in the library for the CPU.
        if (reason := why_not("cpu")) is not None:
            return f"it needs the library for the CPU, and that one does not load: {reason}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} does not load ({cuda_devices.first_line(error)}): {how_to_set_up()}"
    return None


def lacks(op: str, device: str, case: str) -> str | None:
    """None where a loaded library has the op, else that it has not: it was built before there was one."""
    if hasattr(torch.ops.mnemos, op):
        return None
    failure = f"the library is older than {op}: {how_to_set_up()}"
    _checked[op, device, case] = KernelCheck(op, device, case, None, failure)
    return failure


def verify(op: str, device: str, case: str, run: Callable[[], float], tolerance: float) -> str | None:
    """Check a kernel at its first use on a device: None where it may be used, else what is wrong with it.

    Args:
        op: its public name.
        device: ``cpu`` or ``cuda:INDEX``, where it runs.
        case: what else decides which binary runs: the dtype, the head size.
        run: computes a small input forward and backward by the kernel and by PyTorch, and returns the largest relative
            RMSE of any result. It is called once per op, device and case in a process, in a thread of its own, and
            may raise. It must not ask for another check.
        tolerance: the largest error that passes; an error that is not a number does not.

    Raises:
        DeviceLostError: the check, or an earlier one, has left the GPU unable to run anything.
        RuntimeError: a CUDA graph is being captured, in which nothing can be checked; or work that was under way on the
            GPU before the check has failed.
    """
    key = (op, device, case)
    if key not in _checked:
        with LOCK:
            if key not in _checked:
                if device.startswith("cuda"):
                    _prepare_gpu(*key)
                _checked[key] = _check(*key, run, tolerance)
    if _checked[key].lost is not None:
        raise _device_lost(_checked[key])
    return _checked[key].failure


def lost_devices() -> dict[str, KernelCheck]:
    """The GPUs that run nothing more in this process, each with the check that it was lost in."""
    return {check.device: check for check in kernel_checks() if check.lost is not None}


def _prepare_gpu(op: str, device: str, case: str) -> None:
    if (earlier := lost_devices().get(device)) is not None:
        raise _device_lost(earlier)
    if cuda_devices.is_capturing():
        raise RuntimeError(
            f"{op} is used on {device} ({case}) for the first time while a CUDA graph is captured, where its kernel"
            f" cannot be checked: call it once, forward and backward, before the capture"
        )
    # What was under way before is no fault of the kernel: its error is raised here, as it is.
    torch.cuda.synchronize(torch.device(device))


def _check(op: str, device: str, case: str, run: Callable[[], float], tolerance: float) -> KernelCheck:
    error, failure, lost = None, None, None
    try:
        error = _in_own_thread(run)
        if not error <= tolerance:
            failure = f"its results differ from PyTorch's by {error:.1e}, more than {tolerance:.0e}"
            lost = cuda_devices.fatal_error(device) if device.startswith("cuda") else None
    except Exception as exception:  # whatever a broken binary raises, there is another path, unless the GPU is lost
        failure = f"it fails with {type(exception).__name__}: {cuda_devices.first_line(exception)}"
        lost = cuda_devices.fatal_error(device, exception) if device.startswith("cuda") else None
    if lost is not None:
        failure = f"it ends in {lost!r}, after which nothing runs on the device"
    finite = error if error is None or math.isfinite(error) else None
    return KernelCheck(op, device, case, finite, failure, lost)


def _device_lost(check: KernelCheck) -> DeviceLostError:
    return DeviceLostError(
        f"{check.device} is lost: the check of the native kernel of {check.op} ({check.case}) ended in"
        f" {check.lost!r}, after which nothing runs there, PyTorch neither: start again with the backend 'torch'"
        f" (--model.memory.backend torch), or without {library('cuda') or 'the library'}, and report it with the output"
        f" of `mnemos doctor`"
    )


class Kernel(NamedTuple):
    """One binary of an op, as a call would use it."""

    op: str
    device: str  # ``cpu`` or ``cuda:INDEX``
    case: str  # what else the binary depends on: "float32, head size 64"
    register: Callable[[], object]  # registers the op's shapes and gradient with torch, once; needs the library loaded
    error: Callable[[], float]  # the ``run`` of `verify`
    tolerance: float
    shared_memory: int = 0  # bytes that its most demanding block asks for, on a GPU

    @property
    def kind(self) -> Kind:
        """The library that it is in."""
        return "cuda" if self.device.startswith("cuda") else "cpu"


def place(device: torch.device) -> str:
    """``cpu`` or ``cuda:INDEX``."""
    return device.type if device.index is None else f"{device.type}:{device.index}"


def fits(kernel: Kernel) -> bool:
    """Whether to use a kernel. One that is built but fails its check is not used, with one warning."""
    if not load(kernel.kind):
        return False
    failure = refusal(kernel)
    if failure is not None:
        fall_back(kernel.op, kernel.device, kernel.case, failure)
    return failure is None


def refusal(kernel: Kernel) -> str | None:
    """None where a kernel can be used. Loads the library and checks the kernel against PyTorch, each once."""
    if (reason := why_not(kernel.kind)) is not None:
        return reason
    if (reason := lacks(kernel.op, kernel.device, kernel.case)) is not None:
        return reason
    key = (kernel.op, kernel.device, kernel.case)
    if kernel.kind == "cuda" and key not in _checked:
        architectures = build_report().get("libraries", {}).get("cuda", {}).get("architectures")
        reason = cuda_devices.obstacle(kernel.device, kernel.shared_memory, architectures)
        if reason is not None:
            _checked[key] = KernelCheck(*key, None, reason)
    with LOCK:
        kernel.register()
    return verify(kernel.op, kernel.device, kernel.case, kernel.error, kernel.tolerance)


def passed(kernel: Kernel) -> bool:
    """Whether a kernel has been checked in this process, and may be used."""
    check = _checked.get((kernel.op, kernel.device, kernel.case))
    return check is not None and check.failure is None


def kernel_checks() -> Iterator[KernelCheck]:
    """What has been checked so far in this process."""
    return iter(tuple(_checked.values()))


@functools.cache
def warn_once(message: str) -> None:
    """A warning that a process gives once, whatever calls it and from where."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def fall_back(op: str, device: str, case: str, failure: str) -> None:
    """Say, once, that PyTorch takes the place of a kernel that failed its check."""
    what = f"the native kernel of {op} is not used on {device} ({case})"
    with LOCK:
        warn_once(f"{what}: {failure}. {op} runs on PyTorch, slower")


def _in_own_thread(run: Callable[[], float]) -> float:
    """Call in a new thread.

    The first use of an op may come under activation checkpointing, autocast, inference mode or a tracer. Each of them
    applies to one thread, and would see, count or change the operations of the check.
    """
    result: list[float] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            result.append(run())
        except BaseException as exception:  # handed to the caller below
            failure.append(exception)

    thread = threading.Thread(target=target, name="kernel check")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
