"""Three phases on a model of a few dozen numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import EvaluationConfig, OptimizerConfig, ReportConfig, RunConfig
from pipeline.model_config import MAY_CHANGE, ModelConfig
from pipeline.system import System

ROWS = 4
"""Streams, and rows of a step, on any number of ranks."""


@dataclass(frozen=True)
class PhasedConfig(ModelConfig):
    """What ends the first phase."""

    system: str = "phased"
    threshold: float = 0.0
    """The first phase ends when a step's loss is below it."""
    evaluated: int = 0
    """The first phase ends at a held-out evaluation from this step of it on; 0: at none."""
    whole: bool = False
    """Whether the last phase trains all that any phase does."""
    pause: float = field(default=0.0, metadata=MAY_CHANGE)
    """Seconds that a forward pass takes longer, for what happens meanwhile."""


def create(config: RunConfig) -> System:
    """The system of a run whose model section is a `PhasedConfig`."""
    from tests.toy_systems.phased.system import PhasedSystem

    return PhasedSystem(config)


def phased(
    folder: Path, *, threshold: float = 0.0, evaluated: int = 0, whole: bool = False, data: int = 1, **changes: object
) -> RunConfig:
    """A run of it on `data` data ranks, five steps a phase at most."""
    config = RunConfig(
        recipe="phased_tiny", model=PhasedConfig(threshold=threshold, evaluated=evaluated, whole=whole), steps=5,
        batch_size=1, grad_accum=ROWS // data,
        sequence_length=6, lr=0.05, warmup_steps=2, clip=0.0, weight_decay=0.1, save_every=0, eval_every=0, keep=20,
        output_dir=folder, seed=3, evaluation=EvaluationConfig(steps=1), report=ReportConfig(plots=False),
        optimizer=OptimizerConfig(min_lr_ratio=0.2),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]
