"""What ranks tell each other between two micro-batches: go on, a problem, or a stop; and what a step counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from pipeline.data.batch import B, Counts, StatefulLoader
from pipeline.errors import UserError
from pipeline.parallel.collectives import raise_together
from pipeline.parallel.loss import add_counts
from pipeline.parallel.topology import Topology
from pipeline.runtime.heartbeat import HeartbeatMonitor
from pipeline.runtime.stop import REQUESTS, Stopped, StopRequests

MAX_TERMS = 16
"""Loss terms that a step may count: all ranks send as many numbers, also one that failed before it counted."""


class SyncPoint:
    """One small reduction on the host, which no device waits for. Every rank calls it at the same places.

    Without `requests` nothing but a problem stops the ranks; without `monitor` nobody looks out for one that stalls.
    """

    def __init__(
        self, topology: Topology, requests: StopRequests | None = None, monitor: HeartbeatMonitor | None = None
    ) -> None:
        self.topology, self.requests, self.monitor = topology, requests, monitor

    def at(self, place: str) -> None:
        """Says where this rank is, and nothing more."""
        if self.monitor is not None:
            self.monitor.at(place)

    def __call__(
        self, place: str, problem: str | None = None, counts: Mapping[str, int] | None = None
    ) -> dict[str, float]:
        """Raises one rank's `problem` as UserError, or Stopped, on every rank alike. Collective.

        `place` says where this rank is ("step 12, micro-batch 1"), for the monitor. `counts`, of whole rows and of the
        same names on every rank, are returned summed over data ranks: the ranks of a sequence group hold the same rows.
        """
        self.at(place)
        names = sorted(counts or ())
        if len(names) > MAX_TERMS:
            raise ValueError(f"{len(names)} loss terms: at most {MAX_TERMS} are counted")
        pending = self.requests.pending if self.requests is not None else 0
        flags = [int(problem is not None), *(int(pending == request) for request in REQUESTS)]
        numbers = torch.zeros(len(flags) + MAX_TERMS, dtype=torch.int64)
        numbers[: len(flags)] = torch.tensor(flags)
        numbers[len(flags) : len(flags) + len(names)] = torch.tensor([counts[name] for name in names] if counts else [])
        if self.topology.world > 1:
            dist.all_reduce(numbers, group=self.topology.control)
        failed, *requested = numbers[: len(flags)].tolist()
        if failed:
            raise_together(self.topology, problem)
        if any(requested):
            raise Stopped(max(request for request, ranks in zip(REQUESTS, requested, strict=True) if ranks))
        totals = numbers[len(flags) :].tolist()
        return {name: total / self.topology.sequence for name, total in zip(names, totals, strict=False)}


def next_step(loader: StatefulLoader[B], sync_point: SyncPoint, place: str) -> list[B]:
    """A loader's next micro-batches; a document that one rank cannot use stops all of them. Collective."""
    return next_counted_step(loader, sync_point, place)[0]


def next_counted_step(
    loader: StatefulLoader[B],
    sync_point: SyncPoint,
    place: str,
    count: Callable[[B], Counts] | None = None,
    waited: Callable[[float], None] | None = None,
) -> tuple[list[B], dict[str, float]]:
    """As `next_step`, with what each loss term of the step averages over, over all its micro-batches and data ranks.

    `count` says it of one micro-batch. `waited` takes the seconds in which the loader was waited for.
    """
    problem: str | None = None
    batches: list[B] = []
    counts: dict[str, int] = {}
    begun = time.perf_counter()
    try:
        batches = loader.next_step()
        if waited is not None:
            waited(time.perf_counter() - begun)
        counts = {} if count is None else add_counts(map(count, batches))
    except UserError as error:
        problem = str(error)
    return batches, sync_point(place, problem, counts)
