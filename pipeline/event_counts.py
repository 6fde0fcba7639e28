"""Counts what happened to the updates and the streams of a run, for the rows of a system that has names for it."""

from __future__ import annotations

import torch

from pipeline.engine import StepResult
from pipeline.parallel.loss import reduce_sums
from pipeline.run import Run
from pipeline.update_events import NamesEvents, UpdateEvents

NEAR_CLIP = 0.95
"""A gradient norm from this share of the clip on is high."""


class EventCounts:
    """Counts the updates since the last row."""

    def __init__(self, run: Run) -> None:
        self.run = run
        # The run counts an update that was skipped after the row of its step.
        self.skipped = run.progress.skipped
        self._clear()

    def _clear(self) -> None:
        self.updates = self.high = 0

    def add(self, result: StepResult) -> None:
        """One update."""
        clip = self.run.config.clip
        self.updates += 1
        self.skipped += result.skipped
        self.high += clip > 0 and not result.skipped and result.grad_norm >= NEAR_CLIP * clip

    def metrics(self) -> dict[str, float]:
        """Those of the system, after which counts begin anew; none of a system that names none. Collective."""
        system = self.run.system
        if not isinstance(system, NamesEvents):
            return {}
        events = UpdateEvents(self.high / max(1, self.updates), self.skipped, self._restarts())
        self._clear()
        return dict(system.event_metrics(events))

    def _restarts(self) -> int | None:
        """How often the streams of all ranks began their documents anew; None of a loader that does not count it."""
        run = self.run
        streams = run.loader.state_dict().get("streams")
        # Loaders of a run are of one kind, on all ranks.
        if not streams or any("epoch" not in cursor for cursor in streams.values()):
            return None
        here = sum(int(cursor["epoch"]) for cursor in streams.values())
        total = reduce_sums({"restarts": torch.tensor(float(here))}, run.topology, run.device)["restarts"]
        return int(total) // run.topology.sequence
