"""A run without an engine, and records, for what watches it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.callbacks import StepRecord
from pipeline.config import replace
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_tiny
from pipeline.run import Progress, Run
from pipeline.system import Phase, System


class NamedSystem(System):
    """Says what a system says that has no words of its own; it has no model either."""

    name = "named"
    build = initialise = phases = loader = held_out = count = forward = None  # type: ignore[assignment]


class CountingSystem(NamedSystem):
    """Reads its data in eight steps."""

    def steps_per_epoch(self, topology: Topology) -> float:
        return 8.0


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """A run of one rank in an empty folder, `step` steps done; `changes` are of the config."""

    def make(step: int = 0, topology: Topology | None = None, **changes: Any) -> Run:
        config = replace(miras_tiny(), output_dir=tmp_path, parallel__sequence=1, **changes)
        phase = Phase("train", config.steps, ())
        run = Run(
            config,
            topology or Topology(),
            torch.device("cpu"),
            NamedSystem(config),
            phase,
            None,
            None,
            {},  # type: ignore[arg-type]
        )
        run.progress = Progress(step=step, phase="train", tokens=100 * step, elapsed=2.0 * step)
        return run

    return make


@pytest.fixture
def record() -> Callable[..., StepRecord]:
    """The record of a step; every field may be given."""

    def make(step: int = 1, **changes: Any) -> StepRecord:
        facts: dict[str, Any] = {
            "step": step, "loss": 2.5, "lr": 3e-4, "grad_norm": 0.75, "tok_s": 4096.0, "tokens": 100 * step,
            "elapsed": 2.0 * step, "peak_memory": 3 * 2**29, "mfu": None, "metrics": {},
        }  # fmt: skip
        facts |= changes
        return StepRecord(**{"token_loss": facts["loss"], **facts})

    return make
