"""Watch: what the training loop holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from pipeline.parallel.topology import Topology
from pipeline.parallel.watch.heartbeat import ENDED, Whereabouts
from pipeline.parallel.watch.verdict import Limits
from pipeline.parallel.watch.wire import Hub, Link, Meeting, Post, meet
from pipeline.stop import Stopped

GOODBYE = 2.0
"""Seconds in which this rank's last word must be out."""
PASSING_ON = 0.5
"""Seconds that rank 0 leaves the others to read the verdict before it ends."""


class Watch:
    """Names the rank that died or stalls, on every rank. Made by all ranks together; of one rank it does nothing.

    `timeout`: seconds without a beat until a rank is held to stall. A rank of which nothing is heard for that long, or
    for a minute if that is less, is lost. `on_failure` is called once with a sentence, in a thread of the watch, while
    the training thread may hang; it is meant to end the process. `speaks` then says whether this rank is the one to
    print it.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        timeout: float,
        on_failure: Callable[[str], None],
        interval: float | None = None,
        meeting: Meeting | None = None,
    ) -> None:
        self.speaks = False
        self._rank, self._timeout, self._on_failure = topology.rank, timeout, on_failure
        self._own = Whereabouts(topology.rank)
        self._sentence: str | None = None
        self._decided = threading.Event()
        self._post: Post | None = None
        if topology.world == 1:
            return
        meeting = meeting or meet(topology)
        if meeting is None:
            return
        interval = interval or min(5.0, timeout / 4)
        limits = Limits.of(timeout, interval)
        if topology.rank == 0:
            self._post = Hub(self._own, interval, limits, self._decide, meeting, topology.world)
        else:
            self._post = Link(self._own, interval, limits, self._decide, meeting, topology.local_rank)
        self._post.start()

    def beat(self, place: str) -> None:
        """This rank has got to `place`. Costs less than a microsecond."""
        self._own.beat(place)

    def verdict(self, wait: float) -> str | None:
        """After a collective has failed: who is gone, as soon as that is known; None after `wait` seconds."""
        if self._post is None:
            return None
        self._own.asks = True
        self._post.wake()
        self._decided.wait(wait)
        if self._sentence is None:
            self._own.asks = False
        return self._sentence

    def _decide(self, sentence: str, speaks: bool) -> None:
        if self._sentence is not None:
            return
        self._sentence, self.speaks = sentence, speaks
        self._decided.set()
        if self._own.asks:
            return  # the training thread waits for it, and ends by itself
        if self._rank == 0:
            time.sleep(PASSING_ON)
        self._on_failure(sentence)

    def close(self, error: BaseException | None = None) -> None:
        """This rank ends, by an exception or, without one, cleanly; rank 0 then waits for the others to end."""
        if self._post is None:
            return
        if isinstance(error, Stopped):
            error = None  # all ranks agreed to it
        self._own.state = ENDED if error is None else type(error).__name__
        self._post.wake()
        self._post.join(self._timeout if error is None and self._rank == 0 else GOODBYE)
        self._post = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)
