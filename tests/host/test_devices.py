"""A device is known by its whole name, and what only resembles it is not taken for it."""

from __future__ import annotations

import pytest

from pipeline.host.devices import DEVICES, find_device

DRIVERS = {
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-PCIE-40GB": "A100 40GB",
    "NVIDIA A100 80GB PCIe": "A100 80GB PCIe",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H200": "H200",
    "NVIDIA H200 NVL": "H200 NVL",
    "NVIDIA GH200 480GB": "GH200 96GB",
    "NVIDIA GH200 120GB": "GH200 96GB",
    "NVIDIA GH200 144G HBM3e": "GH200 144GB",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
    "NVIDIA B300 SXM6 AC": "B300",
    "NVIDIA GB300": "GB300",
    "NVIDIA L40S": "L40S",
    "NVIDIA L40": "L40",
    "NVIDIA L4": "L4",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "RTX PRO 6000",
    "Tesla T4": "T4",
    "Tesla V100-SXM2-16GB": "V100",
    "Tesla V100-SXM2-32GB": "V100 32GB",
    "Tesla V100-SXM3-32GB": "V100 32GB",
    "Tesla V100-PCIE-16GB": "V100 PCIe",
    "Tesla V100-PCIE-32GB": "V100 PCIe 32GB",
    "Tesla V100S-PCIE-32GB": "V100S",
}


@pytest.mark.parametrize("driver, name", DRIVERS.items())
def test_a_driver_names_a_device_of_the_table(driver: str, name: str) -> None:
    found = find_device(driver)
    assert found is not None and found.name == name


def test_every_device_is_found_by_its_own_name_and_by_a_driver() -> None:
    assert [find_device(device.name) for device in DEVICES] == list(DEVICES)
    assert {device.name for device in DEVICES} == set(DRIVERS.values())


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA H20",
        "NVIDIA A10",
        "NVIDIA L40G",
        "NVIDIA T400",
        "NVIDIA T4G",
        "Tesla V100-FHHL-16GB",
        "Tesla V100-SXM2-32GB-LS",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_a_part_a_slower_one_and_a_stranger_are_not_known(name: str) -> None:
    assert find_device(name) is None


def test_bfloat16_came_with_compute_capability_8() -> None:
    without = {device.name for device in DEVICES if not device.has_bf16}
    assert without == {"T4", "V100", "V100 32GB", "V100 PCIe", "V100 PCIe 32GB", "V100S"}


def test_memory_is_that_of_the_device_and_no_unit_is_mistaken() -> None:
    gib = {device.name: device.memory / 2**30 for device in DEVICES}
    assert gib["A100 40GB"] == 40 and gib["A100"] == 80
    assert 79 < gib["H100"] < 80 < 93 < gib["H100 NVL"] < 94 < 140 < gib["H200"] < 141
    assert 179 < gib["B200"] < gib["GB200"] < 186 and 268 < gib["B300"] < gib["GB300"] < 278
    assert 22 < gib["L4"] < gib["RTX 4090"] <= 24 < gib["RTX 5090"] < 32 < gib["L40S"] < 48
