"""Ranks that are forked from one process, which imports what they need once: that takes longer than most of the jobs.

They are processes like others, with their own signals, sockets and ends. What they share is the time of a start: the
order of the imports, and the seed of hashes, by which sets of strings are ordered. Every command, and what ranks do
together in it (gradients in every stage, saving, resuming, stops, errors and kills), therefore has a test with ranks of
the real launchers too.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import psutil

from tests.launch.harness import ROOT, environment, free_port


class Server:
    """The process that forks, of this process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        # Ranks of launchers are unbuffered too.
        command = [sys.executable, "-u", "-m", "tests.launch.fork_server", str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self.connection, self.answers = ours, ours.makefile("r")
        atexit.register(self.close)

    def ask(self, **request: Any) -> dict[str, Any]:
        self.connection.sendall(json.dumps(request).encode() + b"\n")
        answer = self.answers.readline()
        assert answer, f"the server ended: {self.process.wait()}"
        return json.loads(answer)

    def close(self) -> None:
        self.answers.close()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.process.wait()


@functools.cache
def server() -> Server:
    return Server()


class Forked:
    """A job of one or several ranks that goes on while a test does things to it; `python -m WORDS` is a rank."""

    def __init__(self, ranks: int, *words: str, **variables: str) -> None:
        self.words = words
        self.files = {name: tempfile.NamedTemporaryFile("r") for name in ("output", "errors")}  # noqa: SIM115
        paths = {name: file.name for name, file in self.files.items()}
        begun = server().ask(words=words, ranks=ranks, port=free_port(), variables=variables, **paths)
        self.pid: int = begun["pid"]
        self.ranks: list[int] = begun["ranks"]

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank."""
        return psutil.Process(self.ranks[rank])

    def poll(self) -> int | None:
        """The exit code, once all ranks have ended."""
        return server().ask(pid=self.pid)["code"]

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Returns when the condition holds; fails when the job ends first."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.02)

    def end(self, timeout: float = 120) -> int:
        """Waits for the exit code; kills everything when it does not come in time."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.words, timeout, self.text())
            time.sleep(0.02)
        return code

    def text(self) -> str:
        """What was printed so far."""
        return "".join(self.printed())

    def printed(self) -> list[str]:
        """Standard output, and standard error."""
        for file in self.files.values():
            file.seek(0)
        return [file.read() for file in self.files.values()]


def forked(ranks: int, *words: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """Like `harness.launch`, or `harness.single` with one rank, of ranks that are forked."""
    job = Forked(ranks, *words, **variables)
    code = job.end(timeout)
    return subprocess.CompletedProcess(words, code, *job.printed())
