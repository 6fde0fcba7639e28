"""Norms of the gradients of parts of a model, of a system that measures them."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.capabilities import MeasuresGradients
from pipeline.run import Run
from pipeline.system import StepOutput


def gradient_norms(run: Run) -> StepOutput | None:
    """Norms by the system's metrics, before clipping and without the loss scale, between the backward passes of a step
    and its update; None of a system that measures none. Collective; waits for no device."""
    system, engine = run.system, run.engine
    if not isinstance(system, MeasuresGradients):
        return None
    scale = 1.0 if engine.loss_scale is None else engine.loss_scale.value
    squares: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        gradient = engine.gradient(parameter) if parameter.requires_grad else None
        if gradient is None:
            continue
        for metric, value in system.gradient_squares(name, gradient.detach()).items():
            squares[metric] = squares[metric] + value if metric in squares else value
    one = torch.ones((), device=run.device)
    return StepOutput({}, {}, {metric: (value.sqrt() / scale, one) for metric, value in squares.items()})
