"""What is out of the ordinary in an update: that it was skipped, or the norm of its gradient."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.callbacks import Callback
from pipeline.engine import StepResult
from pipeline.run import Run
from pipeline.skipped_updates import count_overflow, count_skipped, where_it_began
from pipeline.system import StepOutput

WINDOW, LEAST = 128, 16
"""Updates whose gradient norms make the median, and how many there must be."""


class GradientSpikes:
    """Finds norms far above the running median of those before."""

    def __init__(self, factor: float) -> None:
        """`factor`: multiple of the median above which a norm is a spike; 0: none is."""
        self.factor = factor
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def look(self, norm: float) -> float | None:
        """Takes the norm of one update. Returns the median of those before it where it is a spike, else None."""
        enough = self.factor > 0 and len(self._norms) >= LEAST
        median = statistics.median(self._norms) if enough else 0.0
        self._norms.append(norm)
        return median if 0 < self.factor * median < norm else None


class UpdateWatch:
    """Looks at every update of a phase, alike on all ranks."""

    def __init__(self, run: Run, callbacks: Sequence[Callback]) -> None:
        self.run, self.callbacks = run, callbacks
        self.spikes = GradientSpikes(run.config.report.spike_factor)

    def after(self, result: StepResult, outputs: Sequence[StepOutput], position: Mapping[str, Any]) -> None:
        """Counts a skipped update, and reports a gradient spike with the batch that made it. Collective; raises
        UserError when too many in a row were skipped.

        `outputs`: what the micro-batches measured. `position`: where the batch began, as the loader's `state_dict`
        says.
        """
        run = self.run
        if result.scale_was_lowered:
            count_overflow(run, result, self.callbacks)
        elif result.skipped:
            count_skipped(run, outputs, position, self.callbacks)
        else:
            run.progress.skipped_in_a_row = 0
            median = self.spikes.look(result.grad_norm)
            if median is not None:
                # Every loss is finite: these are all streams.
                batch = where_it_began(run, outputs, position)
                for callback in self.callbacks:
                    callback.on_spike(run.progress.step, result.grad_norm, median, batch)
