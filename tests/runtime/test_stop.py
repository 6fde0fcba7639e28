"""A request to stop is noted and nothing more; the ranks act on the gravest of theirs between two micro-batches."""

from __future__ import annotations

import os
import signal
import threading
import time
import types
import warnings

import pytest

from pipeline import cli
from pipeline.callbacks import Callback
from pipeline.end_run import end_run
from pipeline.errors import RankError, UserError
from pipeline.parallel.topology import Topology
from pipeline.runtime.stop import DEADLINE, Stopped, StopRequests
from pipeline.runtime.sync import SyncPoint, next_step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_acted_on_at_the_next_sync_point(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequests() as requests:
        sync_point = SyncPoint(Topology(), requests)
        sync_point("step 1, micro-batch 1")
        # Launchers send the same signal more than once.
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert requests.pending == number
        with pytest.raises(Stopped, match=number.name) as caught:
            sync_point("step 1, micro-batch 2")
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) == before


def test_a_deadline_is_a_request_too_and_a_signal_is_graver() -> None:
    requests = StopRequests(max_hours=1e-6)
    time.sleep(0.01)
    assert requests.pending == DEADLINE
    with pytest.raises(Stopped, match="--max-hours") as caught:
        SyncPoint(Topology(), requests)("here")
    assert caught.value.exit_code == 0 and caught.value.signal is None
    with requests:
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.pending == signal.SIGTERM > DEADLINE
    assert StopRequests(max_hours=1).pending == 0


def test_a_deadline_that_is_known_later_counts_from_the_start() -> None:
    requests = StopRequests()
    time.sleep(0.01)
    assert requests.pending == 0
    requests.max_hours = 0.01 / 3600
    assert requests.pending == DEADLINE


def test_a_person_who_asks_twice_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runtime.stop.REPEAT_TIMEOUT", 0.0)
    with StopRequests():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_thread_may_train_but_gets_no_signals() -> None:
    found = []

    def run() -> None:
        with StopRequests() as requests:
            found.append(requests.pending)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [0] and signal.getsignal(signal.SIGTERM) == before


def test_a_stop_wins_over_the_batch_that_was_read_but_not_over_its_problem() -> None:
    class Loader:
        def next_step(self) -> list[int]:
            return [1]

    requests = StopRequests(max_hours=1e-9)
    with pytest.raises(Stopped):
        next_step(Loader(), SyncPoint(Topology(), requests), "here")  # type: ignore[arg-type]
    assert next_step(Loader(), SyncPoint(Topology()), "here") == [1]  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (Stopped(signal.SIGTERM), "mnemos: stopped (SIGTERM); the same command goes on from the last checkpoint"),
        (UserError("step 9: fix\n it"), "mnemos: step 9: fix it"),
    ],
    ids=repr,
)
def test_why_and_how_a_run_ends_is_said_before_what_may_take_long(
    error: Stopped | UserError, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher kills rank 0 half a minute after another rank has left."""
    written: list[str] = []
    known: list[tuple[str, list[str]]] = []
    monitor = types.SimpleNamespace(ends=lambda error: written.append("ended"))

    def look(**_: object) -> None:
        known.append((capsys.readouterr().err, list(written)))

    class Slow(Callback):
        def on_end(self, status: str) -> None:
            look()
            raise OSError("no connection")

    monkeypatch.setattr("pipeline.end_run.write_run_file", lambda run, status: written.append(status))
    run, saver = types.SimpleNamespace(is_main=True), types.SimpleNamespace(close=look)
    with pytest.warns(UserWarning, match="Slow did not end well"):
        end_run(run, "failed", error, saver, [Slow(), Slow()], monitor)  # type: ignore[arg-type]
    said, before = known[0]
    assert said.splitlines() == [line] and error.reported
    assert before == (["ended", "failed"] if isinstance(error, UserError) else ["failed"])
    assert len(known) == 3, "one that fails does not keep the next from ending"


def test_what_one_rank_cannot_write_is_said_once_and_by_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk every file that is written at the end fails for the same reason."""

    class Full(Callback):
        def on_end(self, status: str) -> None:
            raise RankError("run/training.log: not written")

    def fail(run: object, status: str) -> None:
        raise RankError("run/run.json: not written")

    monkeypatch.setattr("pipeline.end_run.write_run_file", fail)
    ended: list[BaseException] = []
    run, saver = types.SimpleNamespace(is_main=True), types.SimpleNamespace(close=lambda waits: None)
    monitor = types.SimpleNamespace(ends=ended.append)

    def end(status: str, error: UserError | Stopped) -> None:
        end_run(run, status, error, saver, [Full(), Full()], monitor)  # type: ignore[arg-type]

    error = RankError("run/metrics.jsonl: not written (No space left on device): make room there")

    def end_and_raise(words: object) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            end("failed", error)
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", end_and_raise)
    assert cli.main(["train", "x"]) == 2
    assert capsys.readouterr().err == f"mnemos: {error}\n"
    assert ended == [error], "the other ranks are told that this one ends by an error of its own"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        end("stopped", Stopped(signal.SIGTERM))
    assert [str(warning.message).split(":")[0] for warning in caught] == [
        "run.json did not end well", "Full did not end well", "Full did not end well",
    ]  # fmt: skip
