"""metrics.jsonl: one JSON object per logged step or evaluation (docs/metrics.md)."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.callbacks.base import Callback, StepRecord
from pipeline.capabilities import SummarisesAblations
from pipeline.files.output import writing
from pipeline.run import Run
from pipeline.system import Evaluation

ABLATE, SUMMARY = "ablate", "ablate_summary"
"""Modes of the rows of ablations."""
NAMES = ("mode", "phase", "without")
"""Keys whose values are words; all others are numbers or null."""


class MetricsFile(Callback):
    """Appends rows; a resume first drops the rows of steps that will be run again."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.path = run.folder / "metrics.jsonl"
        self._begun: int | None = None

    def on_start(self) -> None:
        # A start from scratch evaluates before its first step again.
        done = self._begun = self.run.progress.step
        self._keep(lambda row: 0 < done >= row["step"])

    def on_step(self, record: StepRecord) -> None:
        self._write(
            {
                "mode": "train",
                "step": record.step,
                **self._place(record.step),
                "loss": record.loss,
                "ppl": None if record.token_loss is None else perplexity(record.token_loss),
                "lr": record.lr,
                "grad_norm": record.grad_norm,
                "tok_s": record.tok_s,
                "tokens": record.tokens,
                "elapsed": record.elapsed,
                "peak_memory": record.peak_memory,
                "mfu": record.mfu,
                "data_wait": record.data_wait,
                **({} if record.loss_scale is None else {"loss_scale": record.loss_scale}),
                **record.metrics,
            }
        )

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        if step == self._begun:
            # Of an evaluation that run.json does not know of: one row is enough.
            self._keep(lambda row: row["mode"] != "val" or row["step"] != step)
        self._write({"mode": "val", "step": step, **self._measured(step, evaluation)})

    def on_ablations(self, step: int, ablations: Mapping[str, Evaluation]) -> None:
        if step == self._begun:
            self._keep(lambda row: row["mode"] not in (ABLATE, SUMMARY) or row["step"] != step)
        for part, evaluation in ablations.items():
            self._write({"mode": ABLATE, "step": step, "without": part, **self._measured(step, evaluation)})
        system = self.run.system
        if isinstance(system, SummarisesAblations):
            summary = system.ablation_summary(ablations)
            self._write({"mode": SUMMARY, "step": step, **self._measured(step, Evaluation(dict(summary)))})

    def _measured(self, step: int, evaluation: Evaluation) -> dict[str, Any]:
        progress = self.run.progress
        passed = {"tokens": progress.tokens, "elapsed": progress.elapsed}
        return {**self._place(step), **evaluation.scalars, **passed}

    def _place(self, step: int) -> dict[str, Any]:
        """The phase of a step, the step's number in it, and the epoch, of a system that counts them."""
        progress, epoch = self.run.progress, self.run.epoch(step)
        place = {"phase": progress.phase, "phase_step": step - progress.phase_start}
        return place if epoch is None else {**place, "epoch": epoch}

    def _keep(self, stays: Callable[[dict[str, Any]], bool]) -> None:
        if not self.path.exists():
            return
        kept = [row for row in read_rows(self.path) if stays(row)]
        partial = self.path.with_name(".metrics.jsonl.partial")
        with writing(self.path):
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            partial.replace(self.path)

    def _write(self, row: dict[str, Any]) -> None:
        # JSON has no NaN: a reader in another language would stop at it.
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        with writing(self.path), self.path.open("a") as handle:
            handle.write(json.dumps(clean) + "\n")


def perplexity(loss: float) -> float:
    """exp(loss), inf where it would overflow."""
    return math.inf if loss >= 700 else math.exp(loss)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, which a power cut or an editor may have spoilt.

    A line that is no row, such as the half of one that a crash leaves, is left out with one warning for all of them:
    rows are there to be looked at, and nothing is trained by them.
    """
    *lines, last = path.read_bytes().split(b"\n")
    # An editor may leave out the end of the last line.
    lines += [last] if last else []
    rows = [row for row in map(_row, lines) if row is not None]
    if len(rows) < len(lines):
        spoilt = len(lines) - len(rows)
        warnings.warn(f"{path}: {spoilt} of {len(lines)} lines are no rows and are left out", stacklevel=2)
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    """An object of finite numbers with a mode and a step; None for any other line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, or not text
        return None
    if not isinstance(row, dict) or not isinstance(row.get("mode"), str):
        return None
    step = row.get("step")
    if type(step) is not int or not 0 <= step < 2**63:
        return None
    return row if all(key in NAMES or _is_number(value) for key, value in row.items()) else None


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and abs(value) <= sys.float_info.max)
