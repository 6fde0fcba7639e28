"""Rank 0's end of the heartbeats."""

from __future__ import annotations

import contextlib
import functools
import selectors
import time
from collections.abc import Callable

from pipeline.runtime.heartbeat.connection import Connection, HeartbeatThread, Meeting
from pipeline.runtime.heartbeat.diagnosis import Diagnosis, Limits, Peer, diagnose
from pipeline.runtime.heartbeat.status import ENDED, RUNS, Heartbeat, RankStatus, packed


class HeartbeatServer(HeartbeatThread):
    """Rank 0's end: receives every rank's heartbeat, answers, diagnoses, and sends the diagnosis to all."""

    def __init__(
        self,
        own: RankStatus,
        interval: float,
        limits: Limits,
        decide: Callable[[Diagnosis, bool], None],
        meeting: Meeting,
        world: int,
    ) -> None:
        super().__init__(own, interval, limits, decide)
        assert meeting.server is not None
        self.server, self.token = meeting.server, meeting.token
        now = time.monotonic()
        self.peers = {rank: Peer(now) for rank in range(world)}
        self.connections: dict[int, Connection] = {}
        self.diagnosis: Diagnosis | None = None
        self.answer, self.answered = b"", 0.0
        self.server.setblocking(False)
        self.selector.register(self.server, selectors.EVENT_READ, self._accept)

    def discount_suspension(self, seconds: float) -> None:
        super().discount_suspension(seconds)
        for peer in self.peers.values():
            peer.heard += seconds

    def _accept(self, now: float) -> None:
        with contextlib.suppress(OSError):  # it has gone again, or there are no more descriptors for it
            accepted, _ = self.server.accept()
            accepted.setblocking(False)
            connection = Connection(accepted)
            self.selector.register(accepted, selectors.EVENT_READ, functools.partial(self._read, connection))

    def _read(self, connection: Connection, now: float) -> None:
        is_open = connection.read()
        for message in connection.messages:
            if connection.rank is None:
                rank = message.get("rank")
                if message.get("token") != self.token or not isinstance(rank, int):
                    is_open = False
                    break
                connection.rank = rank
                self.connections[rank] = connection
                self.alarmed = False
                self.peers[connection.rank].broken = None
            else:
                heartbeat = Heartbeat.decode(message)
                self.peers[connection.rank].hear(heartbeat, now)
                self.hurried = self.hurried or heartbeat.asks
                connection.send(self._answer(now))
        connection.messages.clear()
        if not is_open:
            self.selector.unregister(connection.sock)
            connection.sock.close()
            if connection.rank is not None and self.connections.get(connection.rank) is connection:
                del self.connections[connection.rank]
                self.peers[connection.rank].broken = now
                self.alarmed = self.alarmed or self.peers[connection.rank].state == RUNS
        if self.own.left and self._others_are_done():
            self.wake()  # not at the next tick: this process waits for nothing else

    def _others_are_done(self) -> bool:
        return all(peer.done for rank, peer in self.peers.items() if rank)

    def _answer(self, now: float, fresh: bool = False) -> bytes:
        # Not looked at anew for every one of a thousand ranks.
        if fresh or now - self.answered > min(self.interval, 1.0) / 2:
            diagnosis = None if self.diagnosis is None else self.diagnosis.encode()
            self.answer = packed({"heartbeat": self.own.read().encode(), "diagnosis": diagnosis})
            self.answered = now
        return self.answer

    def tick(self, now: float) -> bool:
        heartbeat = self.own.read()
        self.peers[0].hear(heartbeat, now)
        self.hurried = self.hurried or heartbeat.asks
        if self.diagnosis is None:
            limits = self.limits.hurried(self.interval) if self.hurried else self.limits
            self.diagnosis = diagnose(self.peers, now, limits, 2 * self.interval)
            if self.diagnosis is not None:
                self._send_answer(now)
                self.decide(self.diagnosis, True)
        if heartbeat.left:
            # The others lose their server with this process: at a clean end it is the last to exit.
            if heartbeat.state != ENDED or self.diagnosis is not None or self._others_are_done():
                self._send_answer(now)
                for connection in self.connections.values():
                    connection.finish(0.0)
                return False
        return True

    def _send_answer(self, now: float) -> None:
        data = self._answer(now, fresh=True)
        for connection in self.connections.values():
            connection.send(data)
