"""What ranks tell each other between two micro-batches: go on, a problem, or a stop."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pipeline.data.batch import Batch, StatefulLoader
from pipeline.errors import UserError
from pipeline.parallel.collectives import raise_together
from pipeline.parallel.topology import Topology
from pipeline.runtime.heartbeat import HeartbeatMonitor
from pipeline.runtime.stop import Stopped, StopRequests


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

    def __call__(self, place: str, problem: str | None = None) -> None:
        """Raises one rank's `problem` as UserError, or Stopped, on every rank alike. Collective.

        `place` says where this rank is ("step 12, micro-batch 1"), for the monitor.
        """
        self.at(place)
        request = self.requests.pending if self.requests is not None else 0
        failed = int(problem is not None)
        if self.topology.world > 1:
            flags = torch.tensor([failed, request])
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.topology.control)
            failed, request = map(int, flags)
        if failed:
            raise_together(self.topology, problem)
        if request:
            raise Stopped(request)


def next_step(loader: StatefulLoader, sync_point: SyncPoint, place: str) -> list[Batch]:
    """A loader's next micro-batches; a document that one rank cannot use stops all of them. Collective."""
    problem: str | None = None
    batches: list[Batch] = []
    try:
        batches = loader.next_step()
    except UserError as error:
        problem = str(error)
    sync_point(place, problem)
    return batches
