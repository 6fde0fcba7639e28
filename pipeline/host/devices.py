"""The GPUs that are known by name: peak, bandwidth and memory of each."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet, and its memory by its driver."""

    name: str
    """As `plan --device` takes it."""
    tflops: float
    """Dense bfloat16, or float16 where there is no bfloat16, with float32 sums, TFLOP/s."""
    float32: float
    """Of float32 outside of the matrix units, as torch computes by default, TFLOP/s."""
    bandwidth: float
    """Of device memory, GB/s."""
    mebibytes: int
    """Device memory as nvidia-smi counts it, MiB. A process sees half a per cent to two per cent less."""
    capability: tuple[int, int]
    """CUDA compute capability."""
    pattern: str = ""
    """What its driver's name holds, as a regular expression; empty: the name."""

    @property
    def memory(self) -> int:
        """Bytes of device memory."""
        return self.mebibytes * 2**20

    @property
    def has_bf16(self) -> bool:
        """Whether its matrix units take bfloat16; they have taken float16 since 7.0."""
        return self.capability >= (8, 0)


DEVICES = (
    Device("A100", 312.0, 19.5, 2039.0, 81920, (8, 0)),
    Device("A100 40GB", 312.0, 19.5, 1555.0, 40960, (8, 0), r"A100(-SXM4|-PCIE)?[- ]40GB"),
    Device("A100 80GB PCIe", 312.0, 19.5, 1935.0, 81920, (8, 0)),
    Device("H100", 989.0, 67.0, 3350.0, 81559, (9, 0)),
    Device("H100 PCIe", 756.0, 51.0, 2000.0, 81559, (9, 0)),
    Device("H100 NVL", 835.0, 60.0, 3900.0, 95830, (9, 0)),
    Device("H200", 989.0, 67.0, 4800.0, 143771, (9, 0)),
    Device("H200 NVL", 835.0, 60.0, 4800.0, 143771, (9, 0)),
    # The driver names the whole board by the memory of its CPU.
    Device("GH200 96GB", 989.0, 67.0, 4000.0, 97871, (9, 0), r"GH200( 96GB| 120GB| 480GB)?"),
    Device("GH200 144GB", 989.0, 67.0, 4900.0, 145920, (9, 0), r"GH200 144GB?"),
    Device("B200", 2250.0, 75.0, 8000.0, 183359, (10, 0)),
    Device("GB200", 2500.0, 80.0, 8000.0, 189471, (10, 0)),
    Device("B300", 2250.0, 75.0, 8000.0, 275040, (10, 3)),
    Device("GB300", 2500.0, 80.0, 8000.0, 284208, (10, 3)),
    Device("L40S", 362.0, 91.6, 864.0, 46068, (8, 9)),
    Device("L40", 181.0, 90.5, 864.0, 46068, (8, 9)),
    Device("L4", 121.0, 30.3, 300.0, 23034, (8, 9)),
    Device("RTX 4090", 165.0, 82.6, 1008.0, 24564, (8, 9)),
    Device("RTX 5090", 209.5, 104.8, 1792.0, 32607, (12, 0)),
    Device("RTX PRO 6000", 503.8, 125.0, 1792.0, 97887, (12, 0), r"RTX PRO 6000( Blackwell Workstation Edition)?$"),
    Device("T4", 65.0, 8.1, 320.0, 15360, (7, 5)),
    Device("V100", 125.0, 15.7, 900.0, 16384, (7, 0), r"V100(-SXM2-16GB)?$"),
    Device("V100 32GB", 125.0, 15.7, 900.0, 32768, (7, 0), r"V100( |-SXM[23]-)32GB$"),
    Device("V100 PCIe", 112.0, 14.0, 900.0, 16384, (7, 0), r"V100[- ]PCI[Ee](-16GB)?$"),
    Device("V100 PCIe 32GB", 112.0, 14.0, 900.0, 32768, (7, 0), r"V100[- ]PCI[Ee][- ]32GB$"),
    Device("V100S", 130.0, 16.4, 1134.0, 32768, (7, 0), r"V100S(-PCIE-32GB)?$"),
)
"""Peaks and bandwidths are those of the vendor's data sheets and architecture papers, without sparsity."""

_OTHER = re.compile(r"\b(MIG|Laptop|Max-Q|D)\b")
"""A part of a device, or a slower one of the same name."""


def find_device(name: str) -> Device | None:
    """The device that a driver's name ("NVIDIA H100 80GB HBM3") or one of the table means; None for any other.

    The longest pattern that fits decides.
    """
    if _OTHER.search(name):
        return None
    found = [(match, device) for device in DEVICES if (match := _match(device, name))]
    return max(found, key=lambda pair: len(pair[0]))[1] if found else None


def _match(device: Device, name: str) -> str:
    match = re.search(rf"\b(?:{device.pattern or re.escape(device.name)})(?!\w)", name)
    return match[0] if match else ""


def table() -> str:
    """All of them in columns, as docs/plan.md shows them."""
    lines = ["device          TFLOP/s  float32   GB/s  memory, GiB  compute capability"]
    for device in DEVICES:
        figures = f"{device.tflops:7g}  {device.float32:7g}  {device.bandwidth:5g}  {device.memory / GIB:11.2f}"
        lines.append(f"{device.name:<14}  {figures}  {'.'.join(map(str, device.capability)):>18}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
