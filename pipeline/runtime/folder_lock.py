"""One run at a time in a run directory: two that save the same step would mix their files."""

from __future__ import annotations

import fcntl
import sys
import time
from pathlib import Path
from typing import IO

from pipeline.errors import UserError

LOCK = ".lock"
LOCK_TIMEOUT = 75.0
"""Seconds in which the run before may end: its ranks need a minute to see that others are lost."""


class FolderLock:
    """Acquired by one process of a run and held until the context ends; a process that dies lets go of it."""

    def __init__(self) -> None:
        self._handle: IO[str] | None = None

    def acquire(self, folder: Path, timeout: float = LOCK_TIMEOUT, flag: str = "--output-dir") -> bool:
        """Locks a folder if it exists; False when it was locked here already. UserError, which names the folder's
        `flag`, when another run keeps it.

        On a file system without locks it does nothing.
        """
        if self._handle is not None or not folder.is_dir():
            return False
        handle = (folder / LOCK).open("a")
        begun = time.monotonic()
        reported = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - begun >= timeout:
                    handle.close()
                    raise UserError(
                        f"{flag} {folder}: another run is writing there: wait for its end, or name another folder"
                    ) from None
            except OSError:
                break
            if not reported:
                reported = True
                print(f"mnemos: waiting for another run in {folder} to end", file=sys.stderr, flush=True)
            time.sleep(0.2)
        self._handle = handle
        return True

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None
