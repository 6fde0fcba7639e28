"""Who is to blame, from what the ranks reported and when they were last heard of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.errors import LOST_RANK
from pipeline.runtime.heartbeat.status import ENDED, RUNS, Heartbeat

START_TIMEOUT = 300.0
"""Seconds that a rank is given at least for all that comes before its first progress: imports, weights, compilation."""
LONGEST_LIST = 8
"""Ranks that a sentence names one by one."""


@dataclass(frozen=True)
class Limits:
    """Seconds after which a rank counts as failed."""

    stall: float
    """Without progress, while it could go on."""
    start: float
    """The same before the first progress."""
    silence: float
    """Without a heartbeat."""
    error: float
    """Since it reported that an exception ended it: the others may end by the same one, and report more."""
    broken: float
    """Since its connection was closed: it may come back."""

    @staticmethod
    def of(timeout: float, interval: float) -> Limits:
        return Limits(
            timeout, max(timeout, START_TIMEOUT), min(timeout, 60.0), min(10.0, 8 * interval), min(1.0, 4 * interval)
        )

    def hurried(self, interval: float) -> Limits:
        """For the moment after a collective has failed: somebody is gone, or stalls since about the time-out."""
        short = min(0.3, self.broken)
        return Limits(self.stall / 2, self.stall / 2, min(self.silence, 2 * interval + 2), short, short)


@dataclass(frozen=True)
class Diagnosis:
    """Which ranks failed and how, and the code that the job exits with for it."""

    reason: str
    code: int = LOST_RANK

    def encode(self) -> dict[str, object]:
        return {"reason": self.reason, "code": self.code}

    @staticmethod
    def decode(fields: dict[str, object]) -> Diagnosis:
        """Raises TypeError when the fields are not those of a diagnosis."""
        return Diagnosis(**fields)  # type: ignore[arg-type]


@dataclass
class Peer:
    """A rank as another one sees it. Times are of the observer's clock."""

    heard: float
    last_heartbeat: Heartbeat | None = None
    broken: float | None = None
    """When its connection was closed."""
    over: float | None = None
    """When it first reported that it had ended."""

    def hear(self, heartbeat: Heartbeat, now: float) -> None:
        self.last_heartbeat, self.heard = heartbeat, now
        if self.over is None and heartbeat.state != RUNS:
            self.over = now

    def ended_for(self, now: float) -> float | None:
        """Seconds since an exception ended it; None when none has."""
        return None if self.over is None or self.state in (RUNS, ENDED) else now - self.over

    @property
    def state(self) -> str:
        return RUNS if self.last_heartbeat is None else self.last_heartbeat.state

    @property
    def done(self) -> bool:
        return self.state != RUNS or self.broken is not None

    def age(self, now: float) -> float:
        """Seconds since its last progress, as its last heartbeat had it."""
        return 0.0 if self.last_heartbeat is None else self.last_heartbeat.age + now - self.heard


def diagnose(peers: Mapping[int, Peer], now: float, limits: Limits, slack: float) -> Diagnosis | None:
    """Which rank failed, and how; None while none has.

    `slack`: seconds by which ranks that fall silent together may differ.
    """
    dead = [r for r, p in peers.items() if p.broken is not None and p.state == RUNS and now - p.broken >= limits.broken]
    if dead:
        return Diagnosis(f"{names(dead, peers)}: {died(peers[dead[0]])}")
    quiet = {r: now - p.heard for r, p in peers.items() if not p.done}
    if any(seconds >= limits.silence for seconds in quiet.values()):
        silent = [rank for rank, seconds in quiet.items() if seconds >= limits.silence - slack]
        longest = max(quiet.values())
        return Diagnosis(f"{names(silent, peers)}: no sign of life for {longest:.0f} s, {last_seen(peers[silent[0]])}")
    since = {rank: peer.ended_for(now) for rank, peer in peers.items()}
    raised = {rank: seconds for rank, seconds in since.items() if seconds is not None and seconds >= limits.error}
    # Where all have ended, no rank is left to report to.
    if raised and any(peer.state == RUNS for peer in peers.values()):
        return ended(max(raised, key=lambda rank: raised[rank]), peers)
    if any(seconds > slack for seconds in quiet.values()):
        return None  # its last heartbeat is too old for a diagnosis; the limit of silence decides
    reason = _stalled({r: p for r, p in peers.items() if not p.done and p.last_heartbeat is not None}, now, limits)
    return None if reason is None else Diagnosis(reason)


def _stalled(peers: Mapping[int, Peer], now: float, limits: Limits) -> str | None:
    heartbeats = {rank: peer.last_heartbeat for rank, peer in peers.items() if peer.last_heartbeat is not None}
    ages = {rank: peer.age(now) for rank, peer in peers.items()}
    late = {rank: limits.stall if last.progress else limits.start for rank, last in heartbeats.items()}
    free = [rank for rank, last in heartbeats.items() if not last.waits and not last.asks]
    stuck = [rank for rank in free if ages[rank] >= late[rank]]
    if free and (not stuck or any(late[rank] / 2 <= ages[rank] < late[rank] for rank in free)):
        # A rank moves, and the others wait for it; or it stopped a little later, and gets its full limit.
        return None
    if not free and (
        not heartbeats
        or any(ages[rank] < late[rank] for rank in heartbeats)
        or all(last.asks for last in heartbeats.values())
    ):
        return None
    if stuck and len(stuck) < len(heartbeats):
        return f"{names(stuck, peers)}: no progress for {max(ages[r] for r in stuck):.0f} s {_where(peers[stuck[0]])}"
    # Everybody waits, or nobody is seen to: a GPU's collective does not show in the frames.
    seconds = min(ages.values())
    fewest = min(last.progress for last in heartbeats.values())
    behind = [rank for rank, last in heartbeats.items() if last.progress == fewest]
    if len(behind) == len(heartbeats):
        behind = _minority(heartbeats)
    if len(behind) < len(heartbeats):
        other = next(peer for rank, peer in peers.items() if rank not in behind)
        return (
            f"{names(behind, peers)}: no progress for {seconds:.0f} s {_where(peers[behind[0]])},"
            f" while the others are {_where(other)}"
        )
    if len({last.line for last in heartbeats.values()}) == 1:
        return f"all {len(heartbeats)} ranks wait for each other since {seconds:.0f} s {_where(peers[behind[0]])}"
    places = "; ".join(f"{names([rank], peers)} {_where(peers[rank])}" for rank in behind[:4])
    return f"no rank has made progress for {seconds:.0f} s: {places}"


def _minority(heartbeats: Mapping[int, Heartbeat]) -> list[int]:
    """The ranks that are not where most are; all of them when there is no majority."""
    lines = [last.line for last in heartbeats.values()]
    common = max(sorted(set(lines)), key=lines.count)
    if 2 * lines.count(common) <= len(lines) or lines.count(common) == len(lines):
        return list(heartbeats)
    return [rank for rank, last in heartbeats.items() if last.line != common]


def died(peer: Peer) -> str:
    return f"its process ended without a word (killed, or out of memory), {last_seen(peer)}"


def ended(rank: int, peers: Mapping[int, Peer]) -> Diagnosis:
    """By an exception of its own: the job exits with what that does, since starting again may meet it again."""
    peer = peers[rank]
    code = LOST_RANK if peer.last_heartbeat is None else peer.last_heartbeat.code
    return Diagnosis(f"{names([rank], peers)}: ended by {peer.state} {_where(peer)}", code)


def last_seen(peer: Peer) -> str:
    return "never seen" if peer.last_heartbeat is None else f"last seen {_where(peer)}"


def _where(peer: Peer) -> str:
    if peer.last_heartbeat is None:
        return "at its start"
    return f"at {peer.last_heartbeat.place}" + (f" ({peer.last_heartbeat.line})" if peer.last_heartbeat.line else "")


def names(ranks: Iterable[int], peers: Mapping[int, Peer]) -> str:
    """`rank 3 (node-2)`, `ranks 8, 9 (node-2), 16 (node-3)`."""
    ranks = sorted(ranks)
    hosts: dict[str, list[int]] = {}
    for rank in ranks[:LONGEST_LIST]:
        last = peers[rank].last_heartbeat
        hosts.setdefault("" if last is None else last.host, []).append(rank)
    parts = [", ".join(map(str, group)) + (f" ({host})" if host else "") for host, group in hosts.items()]
    more = len(ranks) - LONGEST_LIST
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(parts) + (f" and {more} more" if more > 0 else "")
