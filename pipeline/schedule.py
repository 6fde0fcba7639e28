"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from pipeline.config import RunConfig


def lr_multiple(config: RunConfig, step: int) -> float:
    """Share of the peak learning rate at update `step`, counted from 1: a linear warm-up, then the schedule's shape."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.optimizer.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    floor = config.optimizer.min_lr_ratio
    if config.optimizer.schedule == "linear":
        return floor + (1 - floor) * (1 - progress)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
