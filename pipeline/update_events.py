"""What happened to the updates and the streams of a run, for a system that has names for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class UpdateEvents:
    """The same on every rank."""

    high_norms: float
    """Share of the updates since the last row whose gradient norm, before clipping, was near the clip or above it."""
    skipped: int
    """Updates since the start of the run that were skipped because a gradient was not finite."""
    restarts: int | None
    """How often the streams have gone through all their documents and begun anew, all streams together, in the data of
    the phase; None: the loader does not count it."""


@runtime_checkable
class NamesEvents(Protocol):
    """A system with metrics of them, in its rows of training."""

    def event_metrics(self, events: UpdateEvents) -> Mapping[str, float]:
        """By name, at logged steps."""
        ...
