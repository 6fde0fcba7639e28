"""How a process ends: the exit codes, and leaving a launched job."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

USER_ERROR = 2
"""Something the user can mend: one line says what."""
LOST_RANK = 3
"""A rank died, stalled or cannot be reached: the same command starts again from the last checkpoint."""

LOST_PEER = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket Timeout",
    "remote process exited or there was a network error", "NCCL error",
)  # fmt: skip
"""What gloo and NCCL say on the ranks that are left when another has gone."""


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PEER)


def leave(code: int) -> NoReturn:
    """Ends a rank of a launched job.

    Not by the interpreter's own exit: the threads of the collectives can abort that, and then a run that finished is
    reported as one that failed, or one that failed loses its exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        # Whoever read it may be gone first, and the exit code still counts.
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
