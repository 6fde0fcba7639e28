"""MFU is never a plausible wrong number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.hardware import PEAK_TFLOPS, on_gpu, peak_flops, peak_memory, utilisation


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch):
    """Makes this machine have a GPU of some name."""

    def name_it(name: str) -> None:
        monkeypatch.setenv("DS_ACCELERATOR", "cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)

    return name_it


@pytest.mark.parametrize(
    "visible, stated, expected",
    [(True, None, True), (True, "cuda", True), (True, "cpu", False), (False, None, False), (False, "cuda", False)],
)
def test_a_gpu_that_is_visible_to_a_cpu_run_is_not_used(
    monkeypatch: pytest.MonkeyPatch, visible: bool, stated: str | None, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if stated is not None:
        monkeypatch.setenv("DS_ACCELERATOR", stated)
    assert on_gpu() is expected


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB300", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_the_longest_name_that_fits_decides(device, name: str, tflops: float) -> None:
    device(name)
    assert peak_flops() == pytest.approx(tflops * 1e12, rel=0.002)


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA L40", 181),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
    ],
)
def test_a_device_that_only_resembles_one_has_its_own_peak_or_none(device, name: str, tflops: float | None) -> None:
    device(name)
    peak = peak_flops()
    assert peak is None or (tflops is not None and peak == pytest.approx(tflops * 1e12, rel=0.01))


@pytest.mark.parametrize("name", ["NVIDIA A10", "AMD Instinct MI300X", "NVIDIA H20", "Tesla V100-SXM2-32GB", ""])
def test_an_unknown_device_has_no_peak(device, name: str) -> None:
    device(name)
    assert peak_flops() is None
    assert peak_flops(250.0) == 250e12


def test_a_cpu_has_no_peak_unless_one_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_flops() is None
    assert peak_flops(0.5) == 0.5e12


def test_a_stated_peak_wins(device) -> None:
    device("NVIDIA H200")
    assert peak_flops(100.0) == 100e12


def test_utilisation_is_unknown_without_a_peak() -> None:
    assert utilisation(1e6, 1e10, 1, None) is None


def test_utilisation_is_the_share_of_all_devices() -> None:
    assert utilisation(20_000, 18e9, 4, 989e12) == pytest.approx(20_000 * 18e9 / (4 * 989e12))
    assert utilisation(1.0, 1.0, 1, 1.0) == 1.0


@given(st.floats(0, 1e9), st.floats(1, 1e15), st.integers(1, 10_000), st.sampled_from(sorted(PEAK_TFLOPS.values())))
def test_utilisation_is_never_above_one(tok_s: float, flops: float, devices: int, tflops: float) -> None:
    share = utilisation(tok_s, flops, devices, tflops * 1e12)
    assert share is None or 0 <= share <= 1
    assert (share is None) == (tok_s * flops / (devices * tflops * 1e12) > 1)


def test_peak_memory_is_the_resident_set_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = peak_memory()
    held = bytearray(64 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    # Torch alone is more than this; a unit mistaken by 1024 would not fit.
    assert 100 * 2**20 < before <= peak_memory() < 64 * 2**30
