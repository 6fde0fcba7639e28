"""HeartbeatMonitor: what the training loop holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from pipeline.parallel.topology import Topology
from pipeline.runtime.exit import exit_code, is_shared
from pipeline.runtime.heartbeat.client import HeartbeatClient
from pipeline.runtime.heartbeat.connection import HeartbeatThread, Meeting, meet
from pipeline.runtime.heartbeat.diagnosis import Diagnosis, Limits
from pipeline.runtime.heartbeat.server import HeartbeatServer
from pipeline.runtime.heartbeat.status import ENDED, RUNS, RankStatus
from pipeline.runtime.stop import Stopped

EXIT_TIMEOUT = 2.0
"""Seconds in which this rank's last heartbeat must be out."""
RELAY_DELAY = 0.5
"""Seconds that rank 0 gives the others to read the diagnosis before it exits."""


class HeartbeatMonitor:
    """Names the rank that died or stalls, on every rank. Made by all ranks together; of one rank it does nothing.

    `timeout`: seconds without progress until a rank is held to stall. A rank of which nothing is heard for that long,
    or for a minute if that is less, is lost. `on_failure` is called once with the diagnosis, and whether this rank is
    the one to print it (`should_report`), in a thread of the monitor, while the training thread may hang; it is meant
    to end the process.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        timeout: float,
        on_failure: Callable[[Diagnosis, bool], None],
        interval: float | None = None,
        meeting: Meeting | None = None,
    ) -> None:
        self.should_report = False
        self._rank, self._timeout, self._on_failure = topology.rank, timeout, on_failure
        self._own = RankStatus(topology.rank)
        self._diagnosis: Diagnosis | None = None
        self._decided = threading.Event()
        self._thread: HeartbeatThread | None = None
        if topology.world == 1:
            return
        meeting = meeting or meet(topology)
        if meeting is None:
            return
        interval = interval or min(5.0, timeout / 4)
        limits = Limits.of(timeout, interval)
        if topology.rank == 0:
            self._thread = HeartbeatServer(self._own, interval, limits, self._decide, meeting, topology.world)
        else:
            self._thread = HeartbeatClient(self._own, interval, limits, self._decide, meeting, topology.local_rank)
        self._thread.start()

    def at(self, place: str) -> None:
        """This rank has got to `place`. Costs less than a microsecond."""
        self._own.at(place)

    def diagnosis(self, wait: float) -> Diagnosis | None:
        """After a collective has failed: who is gone, as soon as that is known; None after `wait` seconds."""
        if self._thread is None:
            return None
        self._own.asks = True
        self._thread.wake()
        self._decided.wait(wait)
        if self._diagnosis is None:
            self._own.asks = False
        return self._diagnosis

    def _decide(self, diagnosis: Diagnosis, should_report: bool) -> None:
        if self._diagnosis is not None:
            return
        self._diagnosis, self.should_report = diagnosis, should_report
        self._decided.set()
        if self._own.asks:
            return  # the training thread waits for it, and ends by itself
        if self._rank == 0:
            time.sleep(RELAY_DELAY)
        self._on_failure(diagnosis, self.should_report)

    def ends(self, error: BaseException | None = None) -> None:
        """Training is over on this rank, by an exception or, without one, cleanly; it may have last things to do."""
        own = self._own
        if self._thread is None or own.state != RUNS:
            return
        is_agreed = error is None or isinstance(error, Stopped)
        own.waits_for_main = self._rank != 0 and (error is None or is_shared(error))
        own.code = 0 if error is None else exit_code(error)
        own.state = ENDED if is_agreed else type(error).__name__
        self._thread.wake()

    def close(self, error: BaseException | None = None) -> None:
        """This rank ends. At an end that all ranks share, the others wait until rank 0 has written its files, because
        launchers kill the rest once a rank has exited with an error; rank 0 waits for the others to end."""
        if self._thread is None:
            return
        self.ends(error)
        own = self._own
        own.left = True
        self._thread.wake()
        waits = own.waits_for_main if self._rank else own.state == ENDED
        self._thread.join(self._timeout if waits else EXIT_TIMEOUT)
        self._thread = None

    def __enter__(self) -> HeartbeatMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)
