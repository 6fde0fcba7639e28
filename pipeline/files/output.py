"""Writing files of a run directory: what cannot be written ends the run by one line that names the file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import RankError, out_of_space


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's error in writing `path` into a RankError, since only the rank that writes knows of it.

    An error of a full disk comes without a name when what was written reaches the disk.
    """
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> RankError:
    """The one line that says so, with the fix."""
    fix = "make room there" if out_of_space(error) else "make it writable"
    reason = error.strerror or str(error)
    return RankError(f"{path}: not written ({reason}): {fix} and start again; a run goes on from its last checkpoint")


def write_json(path: Path, content: Any) -> None:
    """Replaces a JSON file atomically: a reader sees the whole old one or the whole new one. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w") as handle:
            json.dump(content, handle, indent=2, default=str)
            handle.write("\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def overwrite_json(path: Path, content: Any) -> None:
    """Writes over a JSON file within the bytes that it has: no file system needs room for that, but those that copy.

    A reader may meet it half written. Raises OSError, with the file as it was, when it is too small.
    """
    text = json.dumps(content, default=str).encode()
    with path.open("r+b", buffering=0) as handle:
        size = os.fstat(handle.fileno()).st_size
        if len(text) >= size:
            raise OSError(f"{path} has room for {size} bytes, not for {len(text)}")
        handle.write(text.ljust(size - 1) + b"\n")
        os.fsync(handle.fileno())
