"""Threads that work for the whole process, a bounded number: what is waited for comes before what may be."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

T = TypeVar("T")


class EndedError(Exception):
    """The process ends: what was asked for is not done."""


class Workers:
    """At most `most` threads, started when there is work. They end with the process, whatever they wait for."""

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = most, name
        self._changed = threading.Condition()
        self._urgent: OrderedDict[Future[Any], Callable[[], Any]] = OrderedDict()
        self._later: OrderedDict[Future[Any], Callable[[], Any]] = OrderedDict()
        self._unfinished: set[Future[Any]] = set()
        self._threads = self._idle = 0
        self._ended = False

    def submit(self, call: Callable[[], T], *, urgent: bool = False) -> Future[T]:
        """Calls something in a thread, which must not wait for another call. `urgent`: before all that is not."""
        future: Future[T] = Future()
        with self._changed:
            if self._ended:
                future.set_exception(EndedError())
                return future
            (self._urgent if urgent else self._later)[future] = call
            self._unfinished.add(future)
            if self._idle < len(self._urgent) + len(self._later) and self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
            self._changed.notify()
        return future

    def hurry(self, future: Future[Any]) -> None:
        """Somebody waits for it now."""
        with self._changed:
            call = self._later.pop(future, None)
            if call is not None:
                self._urgent[future] = call

    def end(self) -> None:
        """Drops what has not begun, and wakes whoever waits for a call, by an EndedError. Threads that are in a call
        are left to it."""
        with self._changed:
            self._ended = True
            self._urgent.clear()
            self._later.clear()
            unfinished, self._unfinished = self._unfinished, set()
        for future in unfinished:
            with contextlib.suppress(InvalidStateError):  # its call was quicker
                future.set_exception(EndedError())

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._urgent or self._later):
                    self._idle += 1
                    self._changed.wait()
                    self._idle -= 1
                future, call = (self._urgent or self._later).popitem(last=False)
            self._run(future, call)
            # Not kept while it waits: a call may hold the last reference to much.
            del future, call

    def _run(self, future: Future[Any], call: Callable[[], Any]) -> None:
        if future.set_running_or_notify_cancel():
            with contextlib.suppress(InvalidStateError):  # the end was quicker
                try:
                    found = call()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(found)
        with self._changed:
            self._unfinished.discard(future)


def end_with_process(workers: Workers) -> None:
    """`workers.end` at the end of the process, before its other threads are joined: one that waits for a block would
    be waited for. What `atexit` calls comes after that."""
    # It joins the threads of all executors, by a hook of its own: the one that is registered last is called first.
    import concurrent.futures.thread  # noqa: F401

    threading._register_atexit(workers.end)  # type: ignore[attr-defined]
