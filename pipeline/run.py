"""A run: its folder, its state, and what callbacks see of it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline import __version__
from pipeline.config import RunConfig
from pipeline.files.output import overwrite_json, write_json, writing
from pipeline.host.hardware import on_gpu
from pipeline.host.provenance import commit
from pipeline.parallel.topology import Topology
from pipeline.runtime.folder_lock import FolderLock

if TYPE_CHECKING:
    from pipeline.engine import Engine
    from pipeline.system import Phase, System

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy", "safetensors", "flash-attn")


@dataclass
class Progress:
    """Where the run stands; saved in trainer_state.json."""

    step: int = 0
    """Optimizer steps taken, skipped updates included."""
    phase: str = ""
    tokens: int = 0
    """Counted labels so far, all ranks."""
    skipped: int = 0
    """Updates skipped because a gradient was not finite."""
    skipped_in_a_row: int = 0
    elapsed: float = 0.0
    """Seconds of training, over all resumes."""


@dataclass
class Run:
    """Everything the loop and the callbacks share."""

    config: RunConfig
    topology: Topology
    device: torch.device
    system: System
    folder: Path
    progress: Progress = field(default_factory=Progress)
    engine: Engine | None = None
    phase: Phase | None = None
    last_checkpoint: str | None = None
    frozen: dict[str, Any] | None = None
    """What the weights that are not trained are, for checkpoints to name; None when all are trained."""
    lock: FolderLock = field(default_factory=FolderLock)
    """Held by rank 0, so that no other run writes to the folder."""
    chosen: dict[str, str] = field(default_factory=dict)
    """What was chosen for this machine, for the log: layout, backends, data, parameters."""

    @property
    def is_main(self) -> bool:
        """Rank 0 alone writes files and talks to a person."""
        return self.topology.rank == 0

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of one step, over all ranks."""
        config = self.config
        return config.batch_size * config.grad_accum * self.topology.data * config.sequence_length


def versions() -> dict[str, str | None]:
    """Versions of what decides the numbers; None where a package is not installed."""
    found: dict[str, str | None] = {"mnemos": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    return found


def machine(topology: Topology) -> dict[str, Any]:
    """The devices of a run, for run.json and every figure that is published."""
    if on_gpu():
        properties = torch.cuda.get_device_properties(topology.local_rank)
        device = {"kind": "cuda", "name": properties.name, "memory": properties.total_memory}
    else:
        device = {"kind": "cpu", "name": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    return {"device": device, "ranks": topology.world, "data": topology.data, "sequence": topology.sequence,
            "nodes": topology.nodes, "platform": platform.platform()}  # fmt: skip


def write_run_file(run: Run, status: str) -> None:
    """run.json: versions, commit, devices, command, status, last checkpoint. Rank 0 only; raises RankError."""
    path = run.folder / "run.json"
    content = {
        "recipe": run.config.recipe,
        "status": status,
        "last_checkpoint": run.last_checkpoint,
        "progress": dataclasses.asdict(run.progress),
        "command": sys.argv,
        "versions": versions(),
        "commit": commit(),
        "machine": machine(run.topology),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    with writing(path):
        try:
            write_json(path, content)
        except OSError:
            # On a full disk a status that is out of date would say that the run goes on.
            try:
                overwrite_json(path, content)
            except OSError:
                pass
            else:
                return
            raise
