"""The learning rate as a function of the step within a phase."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pipeline.config import RunConfig


@dataclass(frozen=True)
class Schedule:
    """AdamW's settings in a phase, and its learning rate: a linear warm-up, then a shape that ends at the floor."""

    peak: float
    """Learning rate at the end of the warm-up, of a parameter group with `lr_scale` 1."""
    warmup_steps: int = 0
    warmup_start: float = 0.0
    """Share of the peak from which the warm-up rises; its first update is one part above."""
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.1
    """Share of the peak at which a cosine or linear shape ends."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8


def schedule_of(config: RunConfig) -> Schedule:
    """The schedule that the flags of a run describe: that of a phase without one of its own."""
    optimizer = config.optimizer
    return Schedule(
        peak=config.lr,
        warmup_steps=config.warmup_steps,
        warmup_start=optimizer.warmup_start,
        shape=optimizer.schedule,
        floor=optimizer.min_lr_ratio if optimizer.min_lr is None else optimizer.min_lr / config.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
    )


def lr_multiple(schedule: Schedule, steps: int, step: int) -> float:
    """Share of the peak learning rate at update `step` of a phase of `steps` updates, counted from 1."""
    if step <= schedule.warmup_steps:
        return schedule.warmup_start + (1 - schedule.warmup_start) * (step / schedule.warmup_steps)
    if schedule.shape == "constant":
        return 1.0
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps))
    floor = schedule.floor
    if schedule.shape == "linear":
        return floor + (1 - floor) * (1 - progress)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
