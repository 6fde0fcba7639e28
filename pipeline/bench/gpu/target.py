"""The device that the steps run on, found by torch in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import UserError

EMULATED = "MNEMOS_GPU_EMULATED"
"""Set to 1 in tests: every step runs in small on the CPU, the CUDA sources in their emulator."""

ASK = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
if found["available"]:
    device = torch.cuda.get_device_properties(0)
    found |= {"name": device.name, "capability": f"{device.major}.{device.minor}", "memory": device.total_memory,
              "multiprocessors": device.multi_processor_count, "count": torch.cuda.device_count()}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Target:
    """A GPU, or the emulator in its place."""

    name: str
    capability: str | None
    memory: int | None
    """Bytes; None for the emulator."""
    multiprocessors: int | None
    driver: str | None

    @property
    def emulated(self) -> bool:
        return self.capability is None

    @property
    def architecture(self) -> str:
        """As TORCH_CUDA_ARCH_LIST names it. Compute capability 9.0 has instructions of its own under 9.0a."""
        assert self.capability is not None
        return {"9.0": "9.0a"}.get(self.capability, self.capability)


def find_target(environment: Mapping[str, str]) -> Target:
    """The first GPU that torch sees. Raises UserError in one line where there is none."""
    if environment.get(EMULATED) == "1":
        return Target("emulator", None, None, None, None)
    command = [sys.executable, "-W", "ignore", "-c", ASK]
    try:
        answer = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError("torch does not answer within 120 s which GPU there is: see what nvidia-smi says") from None
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{sys.executable} has no working torch ({last}): run ./launch.sh --setup-only")
    found = json.loads(answer.stdout.splitlines()[-1])
    if not found["available"]:
        build = f"built for CUDA {found['cuda']}" if found["cuda"] else "a build for the CPU alone"
        raise UserError(
            f"torch {found['torch']} ({build}) sees no GPU here: run make gpu on a machine with an NVIDIA GPU, its"
            " driver and a torch for it"
        )
    return Target(found["name"], found["capability"], found["memory"], found["multiprocessors"], _driver())


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def device_environment(environment: Mapping[str, str], target: Target) -> dict[str, str]:
    """What every step runs under: one GPU, or none for the emulator."""
    given = dict(environment)
    given["DS_ACCELERATOR"] = "cpu" if target.emulated else "cuda"
    if not target.emulated:
        given.setdefault("CUDA_VISIBLE_DEVICES", "0")
    return {key: value for key, value in given.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
