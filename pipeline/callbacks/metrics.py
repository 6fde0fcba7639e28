"""metrics.jsonl: one JSON object per logged step or evaluation (docs/metrics.md)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pipeline.callbacks.base import Callback, StepRecord
from pipeline.run import Run
from pipeline.system import Evaluation


class MetricsFile(Callback):
    """Appends rows; a resume first drops the rows of steps that will be run again."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.path = run.folder / "metrics.jsonl"

    def on_start(self) -> None:
        if self.path.exists():
            # A start from scratch evaluates before its first step again.
            done = self.run.progress.step
            kept = [row for row in read_rows(self.path) if row["step"] <= done] if done else []
            partial = self.path.with_name(".metrics.jsonl.partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            partial.replace(self.path)

    def on_step(self, record: StepRecord) -> None:
        self._write(
            {
                "mode": "train",
                "step": record.step,
                "loss": record.loss,
                "ppl": perplexity(record.loss),
                "lr": record.lr,
                "grad_norm": record.grad_norm,
                "tok_s": record.tok_s,
                "tokens": record.tokens,
                "elapsed": record.elapsed,
                "peak_memory": record.peak_memory,
                "mfu": record.mfu,
                **record.metrics,
            }
        )

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        progress = self.run.progress
        self._write(
            {"mode": "val", "step": step, **evaluation.scalars, "tokens": progress.tokens, "elapsed": progress.elapsed}
        )

    def _write(self, row: dict[str, Any]) -> None:
        # JSON has no NaN: a reader in another language would stop at it.
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        with self.path.open("a") as handle:
            handle.write(json.dumps(clean) + "\n")


def perplexity(loss: float) -> float:
    """exp(loss), inf where it would overflow."""
    return math.inf if loss >= 700 else math.exp(loss)


def read_rows(path: Any) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut off by a crash is left out."""
    rows = []
    with open(path) as handle:
        for line in handle:
            if not line.endswith("\n"):
                break
            rows.append(json.loads(line))
    return rows


def is_evaluated(folder: Path, step: int) -> bool:
    """Whether the metrics file of a run has a `val` row of a step."""
    path = folder / "metrics.jsonl"
    return path.exists() and any(row["mode"] == "val" and row["step"] == step for row in read_rows(path))
