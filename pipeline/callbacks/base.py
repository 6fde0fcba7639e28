"""The events of a run that callbacks receive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.system import Evaluation, Sample


@dataclass(frozen=True)
class StepRecord:
    """One logged step, the same on every rank."""

    step: int
    loss: float
    """The mean of each loss term, added up."""
    token_loss: float | None
    """Nats per counted label: `loss` without other terms; None where training does not measure it."""
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
    data_wait: float = 0.0
    """Share of the time since the last record in which the rank that waited longest waited for its batches."""
    loss_scale: float | None = None
    """Factor of the loss in the step's backward passes; None unless the model computes in float16."""


class Callback:
    """Base class: override what is needed. Called in order on the ranks where the callback exists."""

    def on_start(self) -> None:
        """Before the first step, after a resume."""

    def on_step(self, record: StepRecord) -> None:
        """After a logged step."""

    def after_step(self, step: int) -> None:
        """After every step."""

    def on_skip(self, step: int, in_a_row: int, batch: dict[str, Any]) -> None:
        """After a step whose update was skipped. `batch` says where in the data the step began: by stream, those
        whose loss was not finite, or all when only a gradient was not; or the position of a loader without streams."""

    def on_overflow(self, step: int, loss_scale: float) -> None:
        """After a step in float16 whose update was skipped since its gradients, times the loss scale, were too large:
        the next step has a lower one."""

    def on_spike(self, step: int, grad_norm: float, median: float, batch: dict[str, Any]) -> None:
        """After a step whose gradient norm is far above the running `median`. `batch` says where in the data the step
        began: all streams, or the position of a loader without streams."""

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """After a held-out evaluation."""

    def on_judged(self, step: int, is_best: bool) -> None:
        """After an evaluation with --evaluation.best: whether it is the best of the phase so far."""

    def on_ablations(self, step: int, ablations: Mapping[str, Evaluation]) -> None:
        """After evaluations without a part of the model each, by the part's name."""

    def on_samples(self, step: int, samples: Mapping[str, Sample]) -> None:
        """After samples were drawn, by the names of their files."""

    def while_paused(self, step: int) -> None:
        """After every step and its saves and evaluations, in time that does not count as training."""

    def on_checkpoint(self, name: str) -> None:
        """After a checkpoint is complete."""

    def on_end(self, status: str) -> None:
        """When the run ends, also by an exception, with the status of run.json: `running` between two phases."""
