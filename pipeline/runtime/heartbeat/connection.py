"""How heartbeats travel: every rank has one connection to rank 0, and a thread that neither computes nor communicates.

Not a TCPStore of torch's: its client waits for ever on a server that is stopped or cut off, whatever its time-out
(torch 2.13: multi_get and the constructor), and a lost server is a page of C++ frames in the log. Here a process that
dies closes its connection, which is seen at once; what only falls silent is diagnosed by the observer's own clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.parallel.collectives import all_gather_object, broadcast_object
from pipeline.parallel.topology import Topology
from pipeline.runtime.heartbeat.diagnosis import Diagnosis, Limits
from pipeline.runtime.heartbeat.status import RUNS, RankStatus, packed

LONGEST_LINE = 1 << 16
CONNECT_TIMEOUT = 10.0
"""Seconds in which a rank must have reached rank 0 at the start."""
HURRIED_TICK = 0.2
CLOSE_TIMEOUT = 1.0
"""Seconds in which the other side must have read the last heartbeat."""
QUICK_TICK = 0.5
"""Seconds between two looks once a connection is gone, or this rank has ended."""


@dataclass
class Meeting:
    """Where the ranks meet. `server` on rank 0, `client` on the others."""

    address: tuple[str, int]
    token: str
    """Known to the ranks of this job alone: other connections are closed."""
    server: socket.socket | None = None
    client: socket.socket | None = None


def meet(topology: Topology) -> Meeting | None:
    """Rank 0 listens, the others connect; None, with a warning, when one cannot. Collective."""
    server = listen() if topology.rank == 0 else None
    port, token = broadcast_object(topology, (server.getsockname()[1], secrets.token_hex(16)) if server else None)
    meeting = Meeting((os.environ.get("MASTER_ADDR", "127.0.0.1"), port), token, server)
    problem = None
    if server is None:
        try:
            meeting.client = connect(meeting, topology.rank, CONNECT_TIMEOUT)
        except OSError as error:
            problem = f"rank {topology.rank} does not reach {meeting.address[0]}:{port} ({error})"
    problems = [text for text in all_gather_object(topology, problem) if text is not None]
    if not problems:
        return meeting
    for connection in (meeting.server, meeting.client):
        if connection is not None:
            connection.close()
    if topology.rank == 0:
        warnings.warn(f"{problems[0]}: a lost rank will be seen only when a collective times out", stacklevel=3)
    return None


def listen() -> socket.socket:
    """A server on any free port, for IPv4 and, where there is one, IPv6."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 is compiled in, but this machine has none
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def connect(meeting: Meeting, rank: int, timeout: float) -> socket.socket:
    connection = socket.create_connection(meeting.address, timeout=timeout)
    connection.sendall(packed({"token": meeting.token, "rank": rank}))
    connection.setblocking(False)
    return connection


@dataclass
class Connection:
    """A socket and what has arrived of its next line."""

    sock: socket.socket
    buffer: bytes = b""
    rank: int | None = None
    messages: list[dict[str, object]] = field(default_factory=list)

    def read(self) -> bool:
        """Reads what has arrived into `messages`; False when the connection is closed, or is none of ours."""
        try:
            arrived = self.sock.recv(LONGEST_LINE)
        except BlockingIOError:
            return True
        except OSError:  # reset: as good as closed
            return False
        *lines, self.buffer = (self.buffer + arrived).split(b"\n")
        try:
            for line in lines:
                message = json.loads(line)
                if not isinstance(message, dict):
                    return False
                self.messages.append(message)
        except (ValueError, RecursionError):
            return False
        return bool(arrived) and len(self.buffer) < LONGEST_LINE

    def finish(self, seconds: float) -> None:
        """Closes once the other side has: a connection that is closed with something unread is reset, and then the
        last heartbeat may be lost."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            self.sock.settimeout(seconds)
            while self.sock.recv(LONGEST_LINE):
                pass
        self.sock.close()

    def send(self, data: bytes) -> None:
        # A full buffer or a broken connection: the other side's silence will be diagnosed, not ours.
        with contextlib.suppress(OSError):
            self.sock.send(data)


class HeartbeatThread(threading.Thread):
    """What both ends have in common: a loop that reads, sends and diagnoses."""

    def __init__(
        self, own: RankStatus, interval: float, limits: Limits, decide: Callable[[Diagnosis, bool], None]
    ) -> None:
        """`decide(diagnosis, should_report)` gets the diagnosis, and whether this rank is the one to print it."""
        super().__init__(name="heartbeat", daemon=True)
        self.own, self.interval, self.limits, self.decide = own, interval, limits, decide
        self.selector = selectors.DefaultSelector()
        self.waker, woken = socket.socketpair()
        for end in (self.waker, woken):
            end.setblocking(False)
        self.selector.register(woken, selectors.EVENT_READ, None)
        self.hurried = self.alarmed = False
        """Whether a collective has failed somewhere, and whether a connection is gone."""

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # it has been woken often enough, or has ended
            self.waker.send(b".")

    def run(self) -> None:
        try:
            self._loop()
        finally:
            for key in list(self.selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
            self.waker.close()
            self.selector.close()

    def _loop(self) -> None:
        woke = time.monotonic()
        due = woke
        while True:
            now = time.monotonic()
            # The sooner each learns that the others have ended, the sooner all can exit.
            quick = self.alarmed or self.own.state != RUNS
            pause = HURRIED_TICK if self.hurried else QUICK_TICK if quick else self.interval
            tick = min(self.interval, pause)
            due = min(due, now + tick)
            events = self.selector.select(max(0.0, due - now))
            now = time.monotonic()
            if now - woke > 2 * self.interval + 0.5:
                # This process was suspended, and so, perhaps, was the whole machine: that time counts for no rank.
                self.discount_suspension(now - woke)
            woke = now
            for key, _ in events:
                if key.data is None:
                    with contextlib.suppress(BlockingIOError):
                        key.fileobj.recv(4096)  # type: ignore[union-attr]
                    due = now
                else:
                    key.data(now)
            if now >= due:
                due = now + tick
                if not self.tick(now):
                    return

    def discount_suspension(self, seconds: float) -> None:
        """Moves every time that an age is counted from by the seconds in which this process was suspended."""
        self.own.progressed_at += seconds

    def tick(self, now: float) -> bool:
        """Sends and diagnoses; False ends the thread."""
        raise NotImplementedError
