"""What this machine has, as far as this project cares: devices, versions, backends, compilers, and what to fix.

Nothing here may fail because something is missing: what cannot be found is None, and what that costs is a warning.
DeepSpeed is looked at from outside (its version, its built operation), because importing it picks an accelerator.
"""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from pipeline.commands.doctor.backends import attention_backends, kernel_facts
from pipeline.commands.doctor.host import deepspeed_facts, gpus, host_facts, installed_version, tools, torch_facts
from pipeline.commands.doctor.problems import warnings_of
from pipeline.host.local import LocalHost

PACKAGES = (
    *("torch", "triton", "deepspeed", "transformers", "tokenizers", "datasets", "numpy", "einops", "safetensors"),
    *("sentencepiece", "tyro", "pydantic", "psutil", "matplotlib", "tensorboard", "ninja"),
    *("flash-attn", "flash-attn-4", "lm-eval", "wandb"),
)

Report = dict[str, Any]


def collect() -> Report:
    """Everything `render` shows, ready for JSON: one mapping per section, and a list of warnings."""
    machine = LocalHost(os.environ)
    report: Report = {
        "python": {"version": platform.python_version(), "executable": sys.executable, "prefix": sys.prefix},
        "machine": host_facts(machine),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "torch": torch_facts(),
        "gpus": gpus(),
        "tools": tools(),
    }
    warnings: list[str] = []
    report["deepspeed"] = deepspeed_facts(machine, warnings)
    device = "cuda" if report["deepspeed"]["accelerator"] == "cuda" else "cpu"
    report["attention"] = attention_backends(device)
    report["kernels"] = kernel_facts(device)
    report["warnings"] = warnings + list(warnings_of(report, machine))
    return report
