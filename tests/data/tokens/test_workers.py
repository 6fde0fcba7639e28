"""Threads of the process: a bounded number, urgent work first, and an end that nobody waits for."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.data.tokens.workers import EndedError, Workers


def test_few_threads_do_all() -> None:
    workers = Workers(3, "some")
    assert [future.result() for future in [workers.submit(lambda n=n: n * n) for n in range(100)]] == [
        n * n for n in range(100)
    ]
    assert 1 <= sum(thread.name.startswith("some-") for thread in threading.enumerate()) <= 3
    # A thread says what a call gave before it takes note of that.
    deadline = time.monotonic() + 10
    while workers._unfinished and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not workers._unfinished


def test_an_error_is_that_of_the_call_and_the_thread_goes_on() -> None:
    workers = Workers(1, "failing")
    with pytest.raises(ZeroDivisionError):
        workers.submit(lambda: 1 // 0).result()
    assert workers.submit(lambda: 1).result() == 1


def test_what_is_waited_for_comes_first() -> None:
    workers, gate, done = Workers(1, "ordered"), threading.Event(), []
    first = workers.submit(gate.wait)
    later = [workers.submit(lambda n=n: done.append(n)) for n in range(4)]
    urgent = workers.submit(lambda: done.append("urgent"), urgent=True)
    workers.hurry(later[2])
    workers.hurry(first)
    later[1].cancel()
    gate.set()
    for future in (urgent, later[3]):
        future.result()
    assert done == ["urgent", 2, 0, 3]


def test_the_end_wakes_who_waits_and_drops_the_rest() -> None:
    workers, gate, done = Workers(1, "ending"), threading.Event(), []
    running, waiting = workers.submit(lambda: gate.wait(10)), workers.submit(lambda: done.append(1))
    while not running.running():
        time.sleep(0.001)
    workers.end()
    for future in (running, waiting, workers.submit(lambda: done.append(2))):
        with pytest.raises(EndedError):
            future.result(5)
    gate.set()
    assert not done
