"""spikes.jsonl: one JSON object per step whose gradient norm was far above its running median (docs/metrics.md)."""

from __future__ import annotations

import json
from typing import Any

from pipeline.callbacks.base import Callback
from pipeline.files.output import writing
from pipeline.run import Run

SPIKES = "spikes.jsonl"


class SpikeFile(Callback):
    """Appends a line for each; a resume first drops those of steps that will be run again."""

    def __init__(self, run: Run) -> None:
        self.run, self.path = run, run.folder / SPIKES

    def on_start(self) -> None:
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(errors="replace").splitlines() if self._stays(line)]
        partial = self.path.with_name(f".{SPIKES}.partial")
        with writing(self.path):
            partial.write_text("".join(f"{line}\n" for line in kept))
            partial.replace(self.path)

    def _stays(self, line: str) -> bool:
        """Whether a line is a whole one, of a step that is not run again."""
        try:
            content = json.loads(line)
        except ValueError:  # a crash leaves the half of one
            return False
        step = content.get("step") if isinstance(content, dict) else None
        return type(step) is int and step <= self.run.progress.step

    def on_spike(self, step: int, grad_norm: float, median: float, batch: dict[str, Any]) -> None:
        row = {"step": step, "grad_norm": grad_norm, "median": median, "batch": batch}
        with writing(self.path), self.path.open("a") as handle:
            handle.write(json.dumps(row) + "\n")
