"""How a process ends: the exit codes, the last message, and leaving a launched job."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from typing import NoReturn, TextIO

from pipeline.errors import LOST_RANK, LostRankError, RankError, UserError, lost_peer, of_a_file, out_of_space
from pipeline.runtime.stop import Stopped

BUG = 1
"""An exception that is nobody's request, with its traceback."""
USER_ERROR = 2
"""Something the user can fix: one line says what."""
INTERRUPTED = 128 + signal.SIGINT
"""A person did not wait for the checkpoint."""


def exit_code(error: BaseException) -> int:
    """What a process exits with that this exception ends."""
    if isinstance(error, Stopped):
        return error.exit_code
    if isinstance(error, LostRankError):
        return error.code
    if isinstance(error, UserError) or out_of_space(error) or of_a_file(error):
        return USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return LOST_RANK if lost_peer(error) else BUG


def is_shared(error: BaseException) -> bool:
    """Whether it is raised on every rank alike, so that one of them says why."""
    return isinstance(error, (Stopped, UserError)) and not isinstance(error, RankError)


def exit_message(error: Stopped | UserError | LostRankError) -> str:
    """The one line that says why it is over, and what follows from it."""
    again = "the same command goes on from the last checkpoint"
    if isinstance(error, Stopped):
        return f"stopped ({error}); {again}"
    if isinstance(error, LostRankError):
        return f"{error}; {again if error.code == LOST_RANK else 'its own lines, above or below, say why'}"
    return str(error)


def log_line(message: str) -> None:
    """One line to the person who started it."""
    try:
        print(f"mnemos: {' '.join(message.split())}", file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Lets go of a stream whose reader is gone: a pipe's, or the terminal. What it still holds would otherwise be
    written when the interpreter ends, fail again, and change the exit code to 120."""
    with contextlib.suppress(io.UnsupportedOperation):  # a stream that is no file
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def exit_process(code: int) -> NoReturn:
    """Ends a rank of a launched job.

    Not by the interpreter's own exit: the threads of the collectives can abort that, and then a run that finished is
    reported as one that failed, or one that failed loses its exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        # Whoever read it may be gone first, and the exit code still counts.
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
