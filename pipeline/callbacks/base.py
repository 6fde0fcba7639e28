"""The events of a run that callbacks receive."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.system import Evaluation


@dataclass(frozen=True)
class StepRecord:
    """One logged step, the same on every rank."""

    step: int
    loss: float
    lr: float
    grad_norm: float | None
    """Before clipping; None when the update was skipped."""
    tok_s: float
    """Input tokens per second over all ranks since the last record."""
    tokens: int
    """Counted labels since the start of the run."""
    elapsed: float
    peak_memory: int
    """Bytes on the rank that has most: allocated on a GPU, resident on a CPU."""
    mfu: float | None
    """Model FLOP/s as a share of the devices' peak; None where the peak is not known."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The system's own."""


class Callback:
    """Base class: override what is needed. Called in order on the ranks where the callback exists."""

    def on_start(self) -> None:
        """Before the first step, after a resume."""

    def on_step(self, record: StepRecord) -> None:
        """After a logged step."""

    def after_step(self, step: int) -> None:
        """After every step."""

    def on_skip(self, step: int, in_a_row: int, batch: dict[str, Any]) -> None:
        """After a step whose update was skipped. `batch` says by stream where in the data the step began: the streams
        whose loss was not finite, or all when only a gradient was not."""

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """After a held-out evaluation."""

    def on_checkpoint(self, name: str) -> None:
        """After a checkpoint is complete."""

    def on_end(self, status: str) -> None:
        """When the run ends, also by an exception, with the status of run.json: `running` between two phases."""
