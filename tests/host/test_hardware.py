"""MFU is never a plausible wrong number."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.host import hardware
from pipeline.host.devices import DEVICES
from pipeline.host.hardware import (
    Roof,
    has_amx,
    has_bf16,
    measured_bandwidth,
    measured_flops,
    on_gpu,
    peak_bandwidth,
    peak_flops,
    peak_memory,
    roof,
    utilisation,
)


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


@pytest.mark.parametrize("major, expected", [(7, False), (8, True), (9, True)])
def test_bfloat16_that_torch_emulates_is_none(
    device, monkeypatch: pytest.MonkeyPatch, major: int, expected: bool
) -> None:
    device("a GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=major))
    assert has_bf16() is expected


def test_a_cpu_multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert has_bf16()


def test_amx_is_among_the_flags_of_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: a CPU\nflags\t\t: fpu avx512_bf16 amx_bf16 avx512_fp16\nbugs\t\t:\n")
    assert has_amx(path)
    path.write_text("processor\t: 0\nmodel name\t: amx_bf16\nflags\t\t: fpu avx512_bf16 amx_bf16x\nbugs\t\t:\n")
    assert not has_amx(path)
    assert not has_amx(tmp_path / "absent")


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
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
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


@pytest.mark.parametrize("name", ["NVIDIA A10", "AMD Instinct MI300X", "NVIDIA H20", "Tesla P100-PCIE-16GB", ""])
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


@given(
    st.floats(0, 1e9),
    st.floats(1, 1e15),
    st.integers(1, 10_000),
    st.sampled_from([device.tflops for device in DEVICES]),
)
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


@pytest.mark.parametrize(
    "name, gigabytes",
    [
        ("NVIDIA H200", 4800),
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA GH200 480GB", 4000),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA A100 80GB PCIe", 1935),
        ("NVIDIA A100-PCIE-40GB", 1555),
        ("NVIDIA L4", 300),
        ("NVIDIA L40", 864),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("Tesla T4", 320),
        ("Tesla V100-SXM2-32GB", 900),
        ("Tesla P100-PCIE-16GB", None),
    ],
)
def test_bandwidth_is_of_the_longest_name_that_fits(device, name: str, gigabytes: float | None) -> None:
    device(name)
    assert peak_bandwidth() == (None if gigabytes is None else gigabytes * 1e9)


def test_the_roof_of_a_gpu_is_its_data_sheet(device) -> None:
    device("NVIDIA H200")
    assert roof(torch.bfloat16) == Roof(989e12, 4800e9, "data sheet")
    assert roof(torch.float32) == Roof(494.5e12, 4800e9, "data sheet")
    device("Tesla T4")
    assert roof(torch.float16) == Roof(65e12, 320e9, "data sheet")
    device("NVIDIA A10")
    assert roof(torch.bfloat16).seconds(1.0, 1.0) is None


def test_the_roof_is_the_slower_of_two() -> None:
    found = Roof(100.0, 10.0, "")
    assert found.seconds(200.0, 1.0) == 2.0
    assert found.seconds(200.0, 50.0) == 5.0


def test_the_higher_of_two_roofs() -> None:
    found = Roof(100.0, 10.0, "measured").higher(Roof(90.0, 12.0, "measured"))
    assert found == Roof(100.0, 12.0, "measured")
    unknown = Roof(None, None, "data sheet")
    assert unknown.higher(unknown) == unknown


def test_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "measured_flops", lambda dtype: 2e11 if dtype == torch.float32 else 3e11)
    monkeypatch.setattr(hardware, "measured_bandwidth", lambda: 2e10)
    assert roof(torch.bfloat16) == Roof(3e11, 2e10, "measured: matrix product, triad")


def test_what_is_measured_counts_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_best", lambda work: work() is None or 0.5)
    assert measured_flops(torch.float32, size=8) == 2 * 8**3 / 0.5
    assert measured_bandwidth(size=100) == 3 * 400 / 0.5


def test_the_first_run_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 0.001, 1.0, 1.4, 2.0, 2.3, 3.0, 3.5])
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(ticks))
    assert hardware._best(lambda: None, repeats=3) == pytest.approx(0.3)
