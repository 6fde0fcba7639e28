"""Any other rank's end of the heartbeats."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable

from pipeline.runtime.heartbeat.connection import CLOSE_TIMEOUT, Connection, HeartbeatThread, Meeting, connect
from pipeline.runtime.heartbeat.diagnosis import Diagnosis, Limits, Peer, died, ended, last_seen, names
from pipeline.runtime.heartbeat.status import ENDED, RUNS, Heartbeat, RankStatus, packed


class HeartbeatClient(HeartbeatThread):
    """Any other rank's end: sends its heartbeat to rank 0, and diagnoses rank 0 alone."""

    def __init__(
        self,
        own: RankStatus,
        interval: float,
        limits: Limits,
        decide: Callable[[Diagnosis, bool], None],
        meeting: Meeting,
        local_rank: int,
    ) -> None:
        super().__init__(own, interval, limits, decide)
        assert meeting.client is not None
        self.meeting, self.local_rank = meeting, local_rank
        self.server = Peer(time.monotonic())
        self.refused = False
        self.connection: Connection | None = None
        self._open(meeting.client)

    def discount_suspension(self, seconds: float) -> None:
        super().discount_suspension(seconds)
        self.server.heard += seconds

    def _open(self, connected: socket.socket) -> None:
        self.connection = Connection(connected)
        self.selector.register(connected, selectors.EVENT_READ, self._read)
        self.server.broken, self.alarmed = None, False

    def _read(self, now: float) -> None:
        if self.connection is None:
            return
        is_open = self.connection.read()
        for message in self.connection.messages:
            self.server.heard = now
            heartbeat, diagnosis = message.get("heartbeat"), message.get("diagnosis")
            if isinstance(heartbeat, dict):
                self.server.hear(Heartbeat.decode(heartbeat), now)
            if isinstance(diagnosis, dict):
                self.decide(Diagnosis.decode(diagnosis), False)
        self.connection.messages.clear()
        if not is_open:
            self.selector.unregister(self.connection.sock)
            self.connection.sock.close()
            self.connection, self.server.broken, self.alarmed = None, now, True
            if self.server.state == RUNS:
                self._reconnect()
        if self.own.left and not self._main_goes_on(now):
            self.wake()  # not at the next tick: this process waits for nothing else

    def tick(self, now: float) -> bool:
        if self.connection is None and self.server.state == RUNS:
            self._reconnect()
        heartbeat = self.own.read()
        if self.connection is not None:
            self.connection.send(packed(heartbeat.encode()))
        if heartbeat.left and not (self.own.waits_for_main and self._main_goes_on(now)):
            if self.connection is not None:
                self.connection.finish(CLOSE_TIMEOUT)
            return False
        if heartbeat.state != RUNS:
            return True  # what becomes of rank 0 is no longer this one's concern
        diagnosis = self._diagnose(now)
        if diagnosis is not None:
            self.decide(diagnosis, self.local_rank == 0)  # there is nobody to choose one that reports: one of each node
        return diagnosis is None

    def _main_goes_on(self, now: float) -> bool:
        left = self.server.last_heartbeat is not None and self.server.last_heartbeat.left
        return self.connection is not None and not left and now - self.server.heard < self.limits.silence

    def _reconnect(self) -> None:
        try:
            self._open(connect(self.meeting, self.own.rank, min(self.interval, 2.0)))
        except ConnectionRefusedError:
            self.refused = True  # nobody listens any more: the process is gone, not the network
        except OSError:  # diagnosed by its silence
            self.refused = False

    def _diagnose(self, now: float) -> Diagnosis | None:
        self.hurried = self.hurried or self.own.asks
        limits = self.limits.hurried(self.interval) if self.hurried else self.limits
        server, name = self.server, names([0], {0: self.server})
        if server.state == ENDED:
            return None
        if server.state != RUNS:
            since = server.ended_for(now)
            return ended(0, {0: server}) if since is not None and since >= limits.error else None
        if server.broken is not None and self.refused and now - server.broken >= limits.broken:
            return Diagnosis(f"{name}: {died(server)}")
        silence = now - server.heard
        if silence >= limits.silence:
            lost = "its process or its node is gone, or the network to it is cut"
            return Diagnosis(f"{name}: no answer for {silence:.0f} s, {last_seen(server)}: {lost}")
        return None
