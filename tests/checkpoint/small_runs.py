"""A run whose DeepSpeed is one linear layer, and what tests ask of its checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.checkpoint.contents import Snapshot
from pipeline.checkpoint.manifest import LATEST, complete_checkpoints
from pipeline.checkpoint.rng import rng_state
from pipeline.checkpoint.save import Saver
from pipeline.config import replace
from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_tiny
from pipeline.run import Progress, Run
from pipeline.system import CarryEntry, ParameterGroup, Phase


class Unwritable:
    """Raises `failure` when it is written."""

    def __init__(self, failure: Exception) -> None:
        self.failure = failure

    def __reduce__(self) -> Any:
        raise self.failure


class Averaging(nn.Linear):
    """Keeps a moving average and a count of what it saw, and a buffer that is no part of its `state_dict`."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.average.lerp_(x, 0.5)
            self.count += 1
            self.scratch.copy_(x)
        return super().forward(x)


class FakeEngine:
    """DeepSpeed's part of a checkpoint: one file. Writing it raises `failure`."""

    stage = 3
    layout = {"optimizer": "none", "order": "none"}
    average = None

    def __init__(self) -> None:
        self.module: nn.Module = nn.Linear(3, 2)
        self.failure: Exception | None = None

    def collect(self, folder: Path, tag: str) -> dict[Path, Any]:
        content = self.module.state_dict() if self.failure is None else Unwritable(self.failure)
        return {folder / tag / "shard.pt": content}

    def load(self, checkpoint: Path) -> None:
        self.module.load_state_dict(torch.load(checkpoint / "shard.pt", weights_only=True))


class FakeLoader:
    def __init__(self) -> None:
        self.state: dict[str, Any] = {"streams": {"0": {"offset": 5}, "1": {"offset": 9}}, "fingerprint": {"texts": 3}}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, value: dict[str, Any]) -> None:
        if value["fingerprint"] != {"texts": 3}:
            raise UserError("the data differs")
        self.state = value


def a_run(folder: Path, step: int = 0, keep: int = 2, topology: Topology | None = None, keep_every: int = 0) -> Run:
    """A run at `step` of two streams, whose model is one linear layer."""
    config = replace(miras_tiny(), output_dir=folder, keep=keep, batch_size=2, parallel__sequence=1)
    config = replace(config, keep_every=keep_every)
    phase = Phase("train", 150, (ParameterGroup("all", ("weight",)),))
    run = Run(  # type: ignore[arg-type]
        config, topology or Topology(), torch.device("cpu"), None, phase, FakeEngine(), FakeLoader(), {}
    )
    run.progress = Progress(step=step, phase="train", tokens=10 * step, elapsed=0.5 * step)
    return run


def snapshot(run: Run, step: int) -> Snapshot:
    run.progress.step = step
    carries = [{"x": CarryEntry(torch.tensor([step, -step]))}]
    return Snapshot(dataclasses.replace(run.progress), FakeLoader().state_dict(), rng_state(), carries)


def save(run: Run, step: int) -> Path:
    saver = Saver(run)
    try:
        (name,) = saver.save(snapshot(run, step))
    finally:
        saver.close()
    return run.folder / "checkpoints" / name


def steps(run: Run) -> list[int]:
    return [int(path.name.split("-")[1]) for path in complete_checkpoints(run.folder / "checkpoints")]


def latest(run: Run) -> Path:
    folder = run.folder / "checkpoints"
    return folder / (folder / LATEST).read_text().strip()
