"""A request to stop is noted and nothing more; the ranks act on the gravest of theirs between two micro-batches."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from pipeline.parallel.pulse import Pulse, next_step
from pipeline.parallel.topology import Topology
from pipeline.stop import DEADLINE, Stopped, StopRequests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_acted_on_at_the_next_pulse(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequests() as requests:
        pulse = Pulse(Topology(), requests)
        pulse("step 1, micro-batch 1")
        # Launchers send the same signal more than once.
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert requests.pending == number
        with pytest.raises(Stopped, match=number.name) as caught:
            pulse("step 1, micro-batch 2")
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) == before


def test_a_deadline_is_a_request_too_and_a_signal_is_graver() -> None:
    requests = StopRequests(max_hours=1e-6)
    time.sleep(0.01)
    assert requests.pending == DEADLINE
    with pytest.raises(Stopped, match="--max-hours") as caught:
        Pulse(Topology(), requests)("here")
    assert caught.value.exit_code == 0 and caught.value.signal is None
    with requests:
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.pending == signal.SIGTERM > DEADLINE
    assert StopRequests(max_hours=1).pending == 0


def test_a_person_who_asks_twice_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stop.SECOND_THOUGHT", 0.0)
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
        next_step(Loader(), Pulse(Topology(), requests), "here")  # type: ignore[arg-type]
    assert next_step(Loader(), Pulse(Topology()), "here") == [1]  # type: ignore[arg-type, comparison-overlap]
