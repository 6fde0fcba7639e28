"""What a GPU can run, and what happens when a kernel leaves it unable to run anything; with stand-ins for the GPU."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.errors import DeviceLostError
from pipeline.ops import cuda_devices, native, scan_native

ROOT = Path(__file__).resolve().parents[2]
ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"


class Gpu:
    """A device that computes until it is broken, and what was asked of it."""

    def __init__(self) -> None:
        self.error: str | None = None
        self.capturing = False
        self.calls: list[str] = []
        self.properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, shared_memory_per_block_optin=232_448)

    def work(self, name: str) -> None:
        self.calls.append(name)
        if self.error is not None:
            raise torch.AcceleratorError(self.error)

    def break_down(self) -> float:
        self.error = ILLEGAL
        self.work("check")
        return 0.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A process with one GPU, for which a library is loaded, and in which nothing was checked or said yet."""
    device = Gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: device.capturing)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device.properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: device.work("synchronize"))
    monkeypatch.setattr(cuda_devices, "probe", lambda _: device.work("probe"))
    monkeypatch.setattr(native, "_checked", {})
    monkeypatch.setattr(native, "why_not", lambda kind: None)
    monkeypatch.setattr(native, "build_report", lambda: {"libraries": {"cuda": {"architectures": ["8.0", "9.0a"]}}})
    monkeypatch.setattr(torch.ops, "mnemos", SimpleNamespace(op=None))
    native.warn_once.cache_clear()
    yield device
    native.warn_once.cache_clear()


def kernel(run: Callable[[], float] = lambda: 0.0, *, device: str = "cuda:0", memory: int = 0) -> native.Kernel:
    return native.Kernel("op", device, "bfloat16, key dim 128", lambda: None, run, 1e-2, memory)


def raising(error: Exception) -> Callable[[], float]:
    def run() -> float:
        raise error

    return run


def test_an_illegal_access_in_the_check_ends_the_run_with_one_line(gpu: Gpu) -> None:
    broken = kernel(gpu.break_down)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said of a path that takes over
        with pytest.raises(DeviceLostError) as caught:
            native.fits(broken)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        "cuda:0 is lost: the check of the native kernel of op (bfloat16, key dim 128) ended in 'CUDA error: an illegal"
    )
    assert "--model.memory.backend torch" in message
    with pytest.raises(DeviceLostError, match="the native kernel of op"):
        native.refusal(broken)


def test_nothing_else_is_checked_on_a_lost_device_and_others_go_on(gpu: Gpu) -> None:
    with pytest.raises(DeviceLostError):
        native.fits(kernel(gpu.break_down))
    ran: list[str] = []
    with pytest.raises(DeviceLostError, match=r"the native kernel of op \(bfloat16, key dim 128\)"):
        native.verify("other", "cuda:0", "float32", lambda: ran.append("cuda:0") or 0.0, 1e-4)
    assert ran == []
    gpu.error = None  # that of cuda:0 alone
    assert native.fits(kernel(device="cuda:1"))
    assert list(native.lost_devices()) == ["cuda:0"]


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered\nmore"),
        torch.AcceleratorError("CUDA error: unspecified launch failure"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
    ids=str,
)
def test_errors_that_no_device_survives_are_known_by_their_words(gpu: Gpu, error: Exception) -> None:
    with pytest.raises(DeviceLostError, match=str(error).partition("\n")[0]):
        native.fits(kernel(raising(error)))


def test_another_error_after_which_the_device_answers_no_more(gpu: Gpu) -> None:
    """It comes late: the check itself ends in something else, or with numbers that are off."""

    def unspecific() -> float:
        gpu.error = "CUDA error: unknown error"
        raise RuntimeError("out of luck")

    def wrong() -> float:
        gpu.error = ILLEGAL
        return 0.5

    with pytest.raises(DeviceLostError, match="ended in 'CUDA error: unknown error'"):
        native.fits(kernel(unspecific))
    gpu.error = None
    with pytest.raises(DeviceLostError, match="ended in 'CUDA error: an illegal memory access"):
        native.fits(kernel(wrong, device="cuda:1"))


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (raising(RuntimeError("CUDA error: no kernel image is available for execution on the device")), "no kernel"),
        (raising(torch.OutOfMemoryError("CUDA out of memory")), "OutOfMemoryError: CUDA out of memory"),
        (lambda: 0.5, "its results differ from PyTorch's by 5.0e-01"),
    ],
)
def test_a_failure_that_the_device_survives_falls_back(gpu: Gpu, run: Callable[[], float], reason: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"op is not used on cuda:0 .*{re.escape(reason)}.*op runs on PyTorch"):
        assert not native.fits(kernel(run))
    assert gpu.calls == ["synchronize", "probe"]
    assert native.lost_devices() == {}


def test_a_device_without_memory_to_probe_it_is_not_lost(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: str) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_devices, "probe", full)
    assert cuda_devices.fatal_error("cuda:0", RuntimeError("something")) is None


def test_what_failed_before_the_check_is_not_blamed_on_the_kernel(gpu: Gpu) -> None:
    gpu.error = "CUDA error: device-side assert triggered"
    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        native.fits(kernel())
    assert native.lost_devices() == {} and list(native.kernel_checks()) == []


def test_a_first_use_while_a_graph_is_captured_is_refused(gpu: Gpu) -> None:
    gpu.capturing = True
    ran: list[int] = []
    first = kernel(lambda: ran.append(1) or 0.0)
    with pytest.raises(
        RuntimeError, match=r"op is used on cuda:0 \(bfloat16, key dim 128\) for the first time while a CUDA"
    ):
        native.fits(first)
    assert ran == [] and gpu.calls == [], "nothing that waits for the device"
    gpu.capturing = False
    assert native.fits(first)
    gpu.capturing = True
    assert native.fits(first) and ran == [1]


def test_a_kernel_that_a_device_cannot_start_is_not_tried(gpu: Gpu) -> None:
    gpu.properties = SimpleNamespace(name="NVIDIA L40S", major=8, minor=9, shared_memory_per_block_optin=101_376)
    ran: list[int] = []
    large = kernel(lambda: ran.append(1) or 0.0, memory=131_072)
    reason = "it needs 131,072 bytes of shared memory per block, and NVIDIA L40S .compute capability 8.9. has 101,376"
    with pytest.warns(RuntimeWarning, match=reason):
        assert not native.fits(large)
    assert ran == [] and gpu.calls == []
    assert native.fits(kernel(device="cuda:1", memory=101_376))


def test_a_device_that_the_library_has_no_code_for(gpu: Gpu) -> None:
    gpu.properties = SimpleNamespace(name="NVIDIA B200", major=10, minor=0, shared_memory_per_block_optin=232_448)
    reason = native.refusal(kernel())
    assert reason == "the library has no code for NVIDIA B200 (compute capability 10.0): it was built for 8.0, 9.0a"


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), ["8.0"], True),
        ((8, 9), ["8.0"], True),
        ((8, 0), ["8.6"], False),
        ((9, 0), ["8.0"], False),
        ((9, 0), ["8.0+PTX"], True),
        ((9, 0), ["9.0a"], True),
        ((9, 1), ["9.0a+PTX"], False),
        ((10, 3), ["10.0"], True),
        ((12, 0), ["8.0", "9.0a", "10.0"], False),
        ((12, 1), ["12.0"], True),
        ((10, 3), ["10.0f"], True),
        ((7, 5), ["8.0+PTX"], False),
    ],
)
def test_which_devices_a_library_has_code_for(
    capability: tuple[int, int], architectures: list[str], runs: bool
) -> None:
    assert cuda_devices.has_code(capability, architectures) == runs


def test_the_table_of_devices_in_the_docs_is_what_the_code_does() -> None:
    """Of docs/kernels.md: every cell but the devices' names and their memory follows from code."""
    (text,) = re.findall(r'^ARCHITECTURES = "(.+)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    page = (ROOT / "docs" / "kernels.md").read_text()
    rows = re.findall(r"^\| (\d+)\.(\d) \|.*?\| (\d+) KB \| (.+?) \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    assert len(rows) >= 8
    for major, minor, kilobytes, affine, *miras in rows:
        code = cuda_devices.has_code((int(major), int(minor)), text.split(";"))
        assert affine == ("native" if code else "PyTorch"), (major, minor)
        for dtype, cell in zip((torch.float32, torch.bfloat16), miras, strict=True):
            fits = [dim for dim, size in scan_native.SHARED_MEMORY[dtype].items() if size <= int(kilobytes) * 1024]
            expected = (
                "native" if fits == [32, 64, 128] else f"key dim {', '.join(map(str, fits))}" if fits else "PyTorch"
            )
            assert cell == (expected if code else "PyTorch"), (major, minor, dtype)
