"""How heartbeats travel: every rank has one connection to rank 0, and a thread that neither computes nor communicates.

Not a TCPStore of torch's: its client waits for ever on a server that is stopped or cut off, whatever its time-out
(torch 2.13: multi_get and the constructor), and a lost server is a page of C++ frames in the log. Here a process that
dies closes its connection, which is seen at once; what only falls silent is judged by the observer's own clock.
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

from pipeline.parallel.collectives import from_all, from_main
from pipeline.parallel.topology import Topology
from pipeline.runtime.heartbeat.diagnosis import Limits, Peer, Verdict, died, ended, judge, last_seen, names
from pipeline.runtime.heartbeat.status import ENDED, RUNS, Heartbeat, Whereabouts, packed

LONGEST_LINE = 1 << 16
CONNECT = 10.0
"""Seconds in which a rank must have reached rank 0 at the start."""
HURRIED_TICK = 0.2
FAREWELL = 1.0
"""Seconds in which the other side must have heard the last words."""
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
    port, token = from_main(topology, (server.getsockname()[1], secrets.token_hex(16)) if server else None)
    meeting = Meeting((os.environ.get("MASTER_ADDR", "127.0.0.1"), port), token, server)
    problem = None
    if server is None:
        try:
            meeting.client = connect(meeting, topology.rank, CONNECT)
        except OSError as error:
            problem = f"rank {topology.rank} does not reach {meeting.address[0]}:{port} ({error})"
    problems = [text for text in from_all(topology, problem) if text is not None]
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


class Post(threading.Thread):
    """What both ends have in common: a loop that reads, sends and judges."""

    def __init__(
        self, own: Whereabouts, interval: float, limits: Limits, decide: Callable[[Verdict, bool], None]
    ) -> None:
        """`decide(verdict, speaks)` is told the verdict, and whether this rank is the one to print it."""
        super().__init__(name="watch", daemon=True)
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
            # The sooner they know of each other that they have ended, the sooner all can leave.
            quick = self.alarmed or self.own.state != RUNS
            pause = HURRIED_TICK if self.hurried else QUICK_TICK if quick else self.interval
            tick = min(self.interval, pause)
            due = min(due, now + tick)
            events = self.selector.select(max(0.0, due - now))
            now = time.monotonic()
            if now - woke > 2 * self.interval + 0.5:
                # This process was suspended, and so, perhaps, was the whole machine: nobody is blamed for that time.
                self.forgive(now - woke)
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

    def forgive(self, seconds: float) -> None:
        self.own.beaten += seconds

    def tick(self, now: float) -> bool:
        """Sends and judges; False ends the thread."""
        raise NotImplementedError


@dataclass
class Line:
    """One connection and what has arrived of its next line."""

    connection: socket.socket
    buffer: bytes = b""
    rank: int | None = None
    messages: list[dict[str, object]] = field(default_factory=list)

    def read(self) -> bool:
        """Reads what has arrived into `messages`; False when the connection is closed, or is none of ours."""
        try:
            arrived = self.connection.recv(LONGEST_LINE)
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
        last words may be lost."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(seconds)
            while self.connection.recv(LONGEST_LINE):
                pass
        self.connection.close()

    def send(self, data: bytes) -> None:
        # A full buffer or a broken connection: the other side's silence will be judged, not ours.
        with contextlib.suppress(OSError):
            self.connection.send(data)


class Hub(Post):
    """Rank 0's end: hears everybody, answers, judges, and tells all of them the verdict."""

    def __init__(
        self,
        own: Whereabouts,
        interval: float,
        limits: Limits,
        decide: Callable[[Verdict, bool], None],
        meeting: Meeting,
        world: int,
    ) -> None:
        super().__init__(own, interval, limits, decide)
        assert meeting.server is not None
        self.server, self.token = meeting.server, meeting.token
        now = time.monotonic()
        self.peers = {rank: Peer(now) for rank in range(world)}
        self.lines: dict[int, Line] = {}
        self.verdict: Verdict | None = None
        self.answer, self.answered = b"", 0.0
        self.server.setblocking(False)
        self.selector.register(self.server, selectors.EVENT_READ, self._accept)

    def forgive(self, seconds: float) -> None:
        super().forgive(seconds)
        for peer in self.peers.values():
            peer.heard += seconds

    def _accept(self, now: float) -> None:
        with contextlib.suppress(OSError):  # it has gone again, or there are no more descriptors for it
            connection, _ = self.server.accept()
            connection.setblocking(False)
            line = Line(connection)
            self.selector.register(connection, selectors.EVENT_READ, lambda when: self._read(line, when))

    def _read(self, line: Line, now: float) -> None:
        is_open = line.read()
        for message in line.messages:
            if line.rank is None:
                rank = message.get("rank")
                if message.get("token") != self.token or not isinstance(rank, int):
                    is_open = False
                    break
                line.rank = rank
                self.lines[rank] = line
                self.alarmed = False
                self.peers[line.rank].broken = None
            else:
                said = Heartbeat.decode(message)
                self.peers[line.rank].hear(said, now)
                self.hurried = self.hurried or said.asks
                line.send(self._answer(now))
        line.messages.clear()
        if not is_open:
            self.selector.unregister(line.connection)
            line.connection.close()
            if line.rank is not None and self.lines.get(line.rank) is line:
                del self.lines[line.rank]
                self.peers[line.rank].broken = now
                self.alarmed = self.alarmed or self.peers[line.rank].state == RUNS

    def _answer(self, now: float, fresh: bool = False) -> bytes:
        # Not looked at anew for every one of a thousand ranks.
        if fresh or now - self.answered > min(self.interval, 1.0) / 2:
            verdict = None if self.verdict is None else self.verdict.encode()
            self.answer = packed({"heartbeat": self.own.read().encode(), "verdict": verdict})
            self.answered = now
        return self.answer

    def tick(self, now: float) -> bool:
        said = self.own.read()
        self.peers[0].hear(said, now)
        self.hurried = self.hurried or said.asks
        if self.verdict is None:
            limits = self.limits.hurried(self.interval) if self.hurried else self.limits
            self.verdict = judge(self.peers, now, limits, 2 * self.interval)
            if self.verdict is not None:
                self._tell(now)
                self.decide(self.verdict, True)
        if said.left:
            others = [peer for rank, peer in self.peers.items() if rank]
            # The others lose their hub with this process: at a clean end it is the last to leave.
            if said.state != ENDED or self.verdict is not None or all(peer.done for peer in others):
                self._tell(now)
                for line in self.lines.values():
                    line.finish(0.0)
                return False
        return True

    def _tell(self, now: float) -> None:
        data = self._answer(now, fresh=True)
        for line in self.lines.values():
            line.send(data)


class Link(Post):
    """Any other rank's end: says where it is, and judges rank 0 alone."""

    def __init__(
        self,
        own: Whereabouts,
        interval: float,
        limits: Limits,
        decide: Callable[[Verdict, bool], None],
        meeting: Meeting,
        local_rank: int,
    ) -> None:
        super().__init__(own, interval, limits, decide)
        assert meeting.client is not None
        self.meeting, self.local_rank = meeting, local_rank
        self.hub = Peer(time.monotonic())
        self.refused = False
        self.line: Line | None = None
        self._open(meeting.client)

    def forgive(self, seconds: float) -> None:
        super().forgive(seconds)
        self.hub.heard += seconds

    def _open(self, connection: socket.socket) -> None:
        self.line = Line(connection)
        self.selector.register(connection, selectors.EVENT_READ, self._read)
        self.hub.broken, self.alarmed = None, False

    def _read(self, now: float) -> None:
        if self.line is None:
            return
        is_open = self.line.read()
        for message in self.line.messages:
            self.hub.heard = now
            heartbeat, verdict = message.get("heartbeat"), message.get("verdict")
            if isinstance(heartbeat, dict):
                self.hub.hear(Heartbeat.decode(heartbeat), now)
            if isinstance(verdict, dict):
                self.decide(Verdict.decode(verdict), False)
        self.line.messages.clear()
        if not is_open:
            self.selector.unregister(self.line.connection)
            self.line.connection.close()
            self.line, self.hub.broken, self.alarmed = None, now, True
            if self.hub.state == RUNS:
                self._reconnect()

    def tick(self, now: float) -> bool:
        if self.line is None and self.hub.state == RUNS:
            self._reconnect()
        said = self.own.read()
        if self.line is not None:
            self.line.send(packed(said.encode()))
        if said.left and not (self.own.waits_for_main and self._main_goes_on(now)):
            if self.line is not None:
                self.line.finish(FAREWELL)
            return False
        if said.state != RUNS:
            return True  # what becomes of rank 0 is no longer this one's concern
        verdict = self._judge(now)
        if verdict is not None:
            self.decide(verdict, self.local_rank == 0)  # there is nobody to choose one speaker: one of each node
        return verdict is None

    def _main_goes_on(self, now: float) -> bool:
        left = self.hub.said is not None and self.hub.said.left
        return self.line is not None and not left and now - self.hub.heard < self.limits.silence

    def _reconnect(self) -> None:
        try:
            self._open(connect(self.meeting, self.own.rank, min(self.interval, 2.0)))
        except ConnectionRefusedError:
            self.refused = True  # nobody listens any more: the process is gone, not the network
        except OSError:  # judged by its silence
            self.refused = False

    def _judge(self, now: float) -> Verdict | None:
        self.hurried = self.hurried or self.own.asks
        limits = self.limits.hurried(self.interval) if self.hurried else self.limits
        hub, name = self.hub, names([0], {0: self.hub})
        if hub.state == ENDED:
            return None
        if hub.state != RUNS:
            since = hub.ended_for(now)
            return ended(0, {0: hub}) if since is not None and since >= limits.last_words else None
        if hub.broken is not None and self.refused and now - hub.broken >= limits.broken:
            return Verdict(f"{name}: {died(hub)}")
        silence = now - hub.heard
        if silence >= limits.silence:
            lost = "its process or its node is gone, or the network to it is cut"
            return Verdict(f"{name}: no answer for {silence:.0f} s, {last_seen(hub)}: {lost}")
        return None
