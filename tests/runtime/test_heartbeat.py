"""Who is held to be lost, and that a monitor neither costs anything nor blames anybody without reason."""

from __future__ import annotations

import errno
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pipeline.errors import LostRankError, RankError, UserError
from pipeline.parallel.topology import Topology
from pipeline.runtime.exit import exit_code
from pipeline.runtime.heartbeat import Diagnosis, HeartbeatMonitor
from pipeline.runtime.heartbeat.connection import Meeting, connect, listen
from pipeline.runtime.heartbeat.diagnosis import Limits, Peer, diagnose
from pipeline.runtime.heartbeat.status import ENDED, RUNS, Heartbeat, look
from pipeline.runtime.stop import DEADLINE, Stopped

NOW = 1000.0
LIMITS = Limits(stall=300, start=600, silence=60, error=10, broken=1)
SLACK = 10.0


def peer(
    rank: int,
    *,
    age: float = 1.0,
    heard: float = 1.0,
    broken: float | None = None,
    progress: int = 7,
    waits: bool = True,
    line: str = "pipeline/engine.py:9",
    state: str = RUNS,
    asks: bool = False,
    over: float | None = None,
    code: int = 0,
) -> Peer:
    """As seen at NOW: `heard`, `broken` and `over` seconds ago."""
    heartbeat = Heartbeat(rank, f"node-{rank // 2}", progress, "step 12", age, waits, line, state, asks, code)
    return Peer(NOW - heard, heartbeat, None if broken is None else NOW - broken, None if over is None else NOW - over)


def diagnosed(*peers: Peer) -> Diagnosis | None:
    return diagnose(dict(enumerate(peers)), NOW, LIMITS, SLACK)


def sentence_of(*peers: Peer) -> str | None:
    found = diagnosed(*peers)
    return None if found is None else found.reason


@pytest.mark.parametrize(
    ("peers", "sentence"),
    [
        ([peer(0), peer(1)], None),
        ([peer(0), peer(1, heard=59)], None),
        ([peer(0), peer(1, heard=61)], "rank 1 (node-0): no sign of life for 61 s, last seen at step 12 (pipeline/e"),
        # A node that is cut off: its ranks were last heard of at slightly different times.
        ([peer(0), peer(1), peer(2, heard=61), peer(3, heard=55)], "ranks 2, 3 (node-1): no sign of life for 61 s"),
        ([peer(0), Peer(NOW - 61)], "rank 1: no sign of life for 61 s, never seen"),
        ([peer(0), peer(1, broken=0.5)], None),
        ([peer(0), peer(1, broken=1.5)], "rank 1 (node-0): its process ended without a word"),
        ([peer(0), peer(1, broken=99, heard=99, state=ENDED)], None),
        ([peer(0), peer(1, over=5, broken=5, state="KeyError")], None),
        ([peer(0), peer(1, over=11, broken=11, state="KeyError")], "rank 1 (node-0): ended by KeyError at step 12"),
        (
            [peer(0), peer(1, over=11, state="Second"), peer(2, over=12, state="First")],
            "rank 2 (node-1): ended by First",
        ),
        # The same error ended all of them; the first still has something to do.
        ([peer(0, over=11, state="UserError"), peer(1, over=11, state="UserError")], None),
        # What came of a death is not its cause.
        ([peer(0), peer(1, over=11, state="RuntimeError"), peer(2, broken=9)], "rank 2 (node-1): its process ended"),
    ],
)
def test_who_is_lost(peers: list[Peer], sentence: str | None) -> None:
    found = sentence_of(*peers)
    assert found == sentence if sentence is None else str(found).startswith(sentence)


@pytest.mark.parametrize(
    ("peers", "code"),
    [
        ([peer(0), peer(1, heard=61)], 3),
        ([peer(0), peer(1, broken=1.5)], 3),
        ([peer(0, age=301), peer(1, age=301, waits=False)], 3),
        # Starting again would meet these again.
        ([peer(0), peer(1, over=11, state="KeyError", code=1)], 1),
        ([peer(0), peer(1, over=11, state="OSError", code=2)], 2),
    ],
)
def test_the_job_exits_with_what_the_rank_to_blame_does(peers: list[Peer], code: int) -> None:
    found = diagnosed(*peers)
    assert found is not None and found.code == code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyError("no such thing"), 1),
        (RuntimeError("CUDA out of memory"), 1),
        (OSError(errno.EIO, "broken"), 1),
        (UserError("fix it"), 2),
        (RankError("fix it here"), 2),
        (OSError(errno.ENOSPC, "no space"), 2),
        (LostRankError("gone", code=3, should_report=True), 3),
        (LostRankError("ended by KeyError", code=1, should_report=True), 1),
        (RuntimeError("Connection closed by peer"), 3),
        (KeyboardInterrupt(), 130),
        (Stopped(signal.SIGTERM), 143),
        (Stopped(DEADLINE), 0),
    ],
    ids=repr,
)
def test_what_an_exception_exits_with(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize(
    ("peers", "sentence"),
    [
        # All wait for one that is elsewhere.
        ([peer(0, age=301), peer(1, age=301, waits=False)], "rank 1 (node-0): no progress for 302 s at step 12"),
        # It still moves: an evaluation on one rank, say.
        ([peer(0, age=301), peer(1, age=20, waits=False)], None),
        # It has stopped a little later than the others, or they would be blamed for waiting for it.
        ([peer(0, age=301, waits=False), peer(1, age=280, waits=False)], None),
        # What it said last is too old to go by.
        ([peer(0, age=301), peer(1, age=301, waits=False, heard=11)], None),
        # Before the first progress there is more time.
        ([peer(0, age=301, progress=0), peer(1, age=301, progress=0, waits=False)], None),
        (
            [peer(0, age=601, progress=0), peer(1, age=601, progress=0, waits=False)],
            "rank 1 (node-0): no progress for 602 s",
        ),
        # Collectives that do not fit together.
        (
            [peer(0, age=301, progress=9, line="a.py:1"), peer(1, age=301, line="b.py:2")],
            "rank 1 (node-0): no progress for 302 s at step 12 (b.py:2), while the others are at step 12 (a.py:1)",
        ),
        ([peer(0, age=301), peer(1, age=301)], "all 2 ranks wait for each other since 302 s at step 12 (pipeline/eng"),
        (
            [peer(0, age=301, line="a.py:1"), peer(1, age=301, line="b.py:2")],
            "no rank has made progress for 302 s: rank 0 (node-0) at step 12 (a.py:1); rank 1 (node-0) at step 12 (b",
        ),
        # On a GPU nobody is seen to wait.
        (
            [peer(rank, age=301, waits=False, line="a.py:2" if rank == 1 else "a.py:1") for rank in range(3)],
            "rank 1 (node-0): no progress for 302 s at step 12 (a.py:2), while the others are at step 12 (a.py:1)",
        ),
        ([peer(0, age=301, asks=True), peer(1, age=301, asks=True)], None),
        # Ranks that have ended wait for nobody.
        ([peer(0, age=900, state=ENDED), peer(1, age=301, waits=False)], "all 1 ranks"),
    ],
)
def test_who_stalls(peers: list[Peer], sentence: str | None) -> None:
    found = sentence_of(*peers)
    assert found == sentence if sentence is None else str(found).startswith(sentence)


def test_long_lists_are_cut() -> None:
    sentence = sentence_of(peer(0), *[peer(rank, heard=70) for rank in range(1, 12)])
    assert str(sentence).startswith("ranks 1 (node-0), 2, 3 (node-1), 4, 5 (node-2), 6, 7 (node-3), 8 (node-4) and 3 m")


def test_reporting_progress_costs_nothing() -> None:
    with HeartbeatMonitor(Topology(), timeout=60, on_failure=pytest.fail) as monitor:
        begun = time.perf_counter()
        for _ in range(100_000):
            monitor.at("step 1, micro-batch 1")
        assert time.perf_counter() - begun < 0.5
        assert monitor.diagnosis(0) is None
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


class Job:
    """Monitors of one job, all in this process."""

    def __init__(self, world: int, timeout: float, interval: float) -> None:
        self.failures: dict[int, str] = {}
        self.codes: set[int] = set()
        self.token = "secret"
        server = listen()
        self.port = server.getsockname()[1]
        self.monitors = []
        for rank in range(world):
            meeting = Meeting(("127.0.0.1", self.port), self.token, server if rank == 0 else None)
            if rank:
                meeting.client = connect(meeting, rank, 5)
            fail = self._failure(rank)
            topology = Topology(rank, world, local_rank=rank)
            self.monitors.append(
                HeartbeatMonitor(topology, timeout=timeout, interval=interval, on_failure=fail, meeting=meeting)
            )

    def _failure(self, rank: int) -> Callable[[Diagnosis], None]:
        def fail(found: Diagnosis, should_report: bool) -> None:
            self.failures[rank] = found.reason
            self.codes.add(found.code)

        return fail

    def progress(self, seconds: float, *ranks: int) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for rank in ranks:
                self.monitors[rank].at("step 1")
            time.sleep(0.02)

    def leave(self, rank: int, error: BaseException | None = None) -> threading.Thread:
        """Ends a rank, which may wait for the others; returns what waits."""
        thread = threading.Thread(target=self.monitors[rank].close, args=(error,))
        thread.start()
        return thread

    def close(self) -> None:
        for thread in [self.leave(rank) for rank in range(len(self.monitors))]:
            thread.join()


@pytest.fixture
def job() -> Iterator[Job]:
    made = Job(3, timeout=0.8, interval=0.1)
    yield made
    made.close()
    # One that waited in vain for as long as it may ends a little after its rank.
    for thread in [thread for thread in threading.enumerate() if thread.name == "heartbeat"]:
        thread.join(2)
        assert not thread.is_alive()


def test_all_is_well_while_all_make_progress(job: Job) -> None:
    job.progress(1.5, 0, 1, 2)
    assert job.failures == {}


def test_a_stall_is_told_to_all_and_printed_by_one(job: Job) -> None:
    job.progress(0.3, 0, 1, 2)
    job.progress(2.0, 0, 1)
    assert set(job.failures) == {0, 1, 2} and len(set(job.failures.values())) == 1
    assert job.failures[0].startswith(f"rank 2 ({socket.gethostname()}): no progress for 1 s at step 1")
    assert [monitor.should_report for monitor in job.monitors] == [True, False, False]


def test_a_closed_monitor_is_not_missed(job: Job) -> None:
    job.progress(0.3, 0, 1, 2)
    job.leave(2)
    job.progress(1.5, 0, 1)
    assert job.failures == {}


def test_a_stop_that_all_agreed_to_is_a_clean_end(job: Job) -> None:
    job.progress(0.3, 0, 1, 2)
    job.leave(2, Stopped(signal.SIGTERM))
    job.progress(1.5, 0, 1)
    assert job.failures == {}


@pytest.mark.parametrize("error", [Stopped(signal.SIGTERM), UserError("fix it")], ids=repr)
def test_at_an_end_that_all_share_they_wait_for_the_first_rank_to_be_done(error: Exception) -> None:
    """Longer than an exception of one rank alone is left to explain itself."""
    job = Job(3, timeout=20, interval=0.1)
    job.progress(0.3, 0, 1, 2)
    job.monitors[0].ends(error)
    others = [job.leave(rank, error) for rank in (1, 2)]
    job.progress(1.5)
    assert job.failures == {} and all(thread.is_alive() for thread in others)
    begun = time.monotonic()
    for thread in [*others, job.leave(0, error)]:
        thread.join()
    assert job.failures == {} and time.monotonic() - begun < 2


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["first rank first", "first rank last"])
def test_a_clean_end_waits_for_no_tick(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runtime.heartbeat.connection.QUICK_TICK", 60.0)
    job = Job(3, timeout=200, interval=60)
    leaving = []
    for rank in order:
        leaving.append(job.leave(rank))
        time.sleep(0.1)
    for thread in leaving:
        thread.join(20)
        assert not thread.is_alive()
    assert job.failures == {}


def test_nobody_waits_for_a_first_rank_that_is_gone() -> None:
    job = Job(2, timeout=20, interval=0.1)
    job.progress(0.3, 0, 1)
    waiting = job.leave(1, UserError("fix it"))
    job.progress(0.3, 0)
    job.monitors[0].close(KeyError())
    waiting.join(2)
    assert not waiting.is_alive() and job.failures == {}


def test_an_error_of_one_rank_alone_waits_for_nobody(job: Job) -> None:
    job.progress(0.3, 0, 1, 2)
    begun = time.monotonic()
    job.monitors[1].close(OSError(errno.ENOSPC, "no space"))
    assert time.monotonic() - begun < 0.5
    job.progress(1.5, 0, 2)
    assert set(job.failures) == {0, 2} and job.codes == {2}


def test_an_exception_is_named_once_the_others_had_time_to_end_by_it_too(job: Job) -> None:
    job.progress(0.3, 0, 1, 2)
    job.monitors[2].close(KeyError())
    job.progress(0.4, 0, 1)
    assert job.failures == {}
    job.progress(1.5, 0, 1)
    assert "rank 2" in job.failures[1] and "ended by KeyError at step 1" in job.failures[1]
    assert job.codes == {1}


def test_the_training_thread_is_told_when_it_asks(job: Job) -> None:
    job.progress(0.3, 0, 1, 2)
    job.monitors[2].close(KeyError())
    job.monitors[1].at("step 1")
    assert "ended by KeyError" in str(job.monitors[1].diagnosis(5))
    assert 1 not in job.failures
    assert job.monitors[1].diagnosis(5) is not None  # again: at once


def test_nobody_is_named_when_nobody_is_lost(job: Job) -> None:
    job.progress(0.2, 0, 1, 2)
    assert job.monitors[1].diagnosis(0.2) is None


def test_an_interruption_of_one_connection_is_overcome(job: Job) -> None:
    job.progress(0.3, 0, 1, 2)
    client = job.monitors[1]._thread
    assert client is not None
    client.connection.sock.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]
    job.progress(1.5, 0, 1, 2)
    assert job.failures == {}


def test_strangers_are_turned_away(job: Job) -> None:
    for words in (b'{"token": "guess", "rank": 1}\n', b"GET / HTTP/1.0\r\n\r\n", b"[]\n", b"x" * 200_000):
        with socket.create_connection(("127.0.0.1", job.port), timeout=5) as stranger:
            try:
                stranger.sendall(words)
                assert stranger.recv(1) == b""
            except ConnectionError:
                pass
    job.progress(0.5, 0, 1, 2)
    assert job.failures == {}


def test_time_in_which_the_machine_slept_counts_for_nobody() -> None:
    job = Job(2, timeout=60, interval=5)
    server = job.monitors[0]._thread
    before = server.peers[1].heard, job.monitors[0]._own.progressed_at  # type: ignore[union-attr]
    server.discount_suspension(1000)  # type: ignore[union-attr]
    after = server.peers[1].heard, job.monitors[0]._own.progressed_at  # type: ignore[union-attr]
    assert [b - a for a, b in zip(before, after, strict=True)] == pytest.approx([1000, 1000], abs=5)
    job.close()
    assert job.failures == {}


def test_a_thread_is_seen_where_it_is() -> None:
    waits, line = look(threading.get_ident())
    assert not waits and line.startswith("pipeline/runtime/heartbeat/status.py:")
