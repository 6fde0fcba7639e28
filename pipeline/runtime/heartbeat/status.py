"""What a rank sends of its own state every few seconds."""

from __future__ import annotations

import dataclasses
import json
import linecache
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

PACKAGE = Path(__file__).resolve().parents[2]
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "/deepspeed/runtime/comm/")
"""Folders whose code communicates: a thread whose innermost frame is there waits for other ranks."""
RUNS, ENDED = "runs", "ended"


@dataclass(frozen=True)
class Heartbeat:
    """A rank's own account of where it is."""

    rank: int
    host: str
    progress: int
    """Places that it has got to since its start."""
    place: str
    age: float
    """Seconds since the last progress, by the rank's own clock."""
    waits: bool
    """Whether it is inside a collective."""
    line: str
    """The innermost line of this project, as file:line."""
    state: str = RUNS
    """RUNS, ENDED, or the name of the exception that ended it."""
    asks: bool = False
    """Whether a collective has failed there, and it asks who is gone."""
    code: int = 0
    """What it exits with, once it has ended."""
    left: bool = False
    """Whether it has ended and has nothing more to do."""

    def encode(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @staticmethod
    def decode(fields: dict[str, object]) -> Heartbeat:
        """Raises TypeError when the fields are not those of a heartbeat."""
        return Heartbeat(**fields)  # type: ignore[arg-type]


class RankStatus:
    """Where this rank is: the training thread sets it, the thread of the monitor reads it."""

    def __init__(self, rank: int) -> None:
        self.rank, self.host = rank, socket.gethostname()
        self.thread = threading.get_ident()
        self.place, self.progress, self.progressed_at = "start", 0, time.monotonic()
        self.state, self.asks, self.code, self.left = RUNS, False, 0, False
        self.waits_for_main = False
        """Whether it ends as rank 0 does, and stays until that has nothing more to do."""

    def at(self, place: str) -> None:
        self.place = place
        self.progress += 1
        self.progressed_at = time.monotonic()

    def read(self) -> Heartbeat:
        waits, line = look(self.thread)
        age = max(0.0, time.monotonic() - self.progressed_at)
        own = (self.state, self.asks, self.code, self.left)
        return Heartbeat(self.rank, self.host, self.progress, self.place, age, waits, line, *own)


def look(thread: int) -> tuple[bool, str]:
    """Whether a thread is inside a collective, and its innermost line of this project."""
    frames = sys._current_frames()
    own = threading.get_ident()
    innermost = frames.get(thread)
    if innermost is None:
        return False, ""
    waits = _communicates(innermost)
    if not waits and "_engine_run_backward" in _functions(innermost):
        # A backward pass on a GPU runs its hooks, which communicate, in a thread of autograd's.
        waits = any(_communicates(frame) for ident, frame in frames.items() if ident not in (thread, own))
    return waits, _line(innermost)


def _communicates(frame: FrameType) -> bool:
    file = frame.f_code.co_filename.replace("\\", "/")
    if any(folder in file for folder in COLLECTIVES):
        return True
    # The wait of an asynchronous collective is a C++ method, which has no frame of its own.
    asynchronous = "/deepspeed/" in file or file.startswith(str(PACKAGE / "parallel"))
    return asynchronous and ".wait(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno)


def _functions(frame: FrameType | None, depth: int = 6) -> set[str]:
    names = set()
    while frame is not None and depth:
        names.add(frame.f_code.co_name)
        frame, depth = frame.f_back, depth - 1
    return names


def _line(innermost: FrameType) -> str:
    frame: FrameType | None = innermost
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE.parent).as_posix()}:{frame.f_lineno}"
        frame = frame.f_back
    return f"{Path(innermost.f_code.co_filename).name}:{innermost.f_lineno}"


def packed(message: dict[str, object]) -> bytes:
    """One line of JSON."""
    return json.dumps(message).encode() + b"\n"
