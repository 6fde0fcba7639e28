"""gzip, zstd, bzip2 and xz files, read forward; where the damage of a broken one begins shows as `Damaged`."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
CHUNK = 1 << 20
"""Bytes of text that are decompressed at a time. What a damaged archive still gives depends on it, so it is fixed."""


class Damaged(Exception):
    """The content of a file cannot be read as what its name says; the message begins with the file."""


def is_damage(error: BaseException) -> bool:
    """Whether the content is at fault, and not a disk or a network that may give it another time."""
    import pyarrow

    kinds = (
        *(pyarrow.ArrowException, ValueError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile),
        *(MemoryError, RecursionError),
    )
    # A decoder's own errors are plain OSErrors without a number; those of the system and of a network are not.
    return isinstance(error, kinds) or (type(error) is OSError and error.errno is None)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the exception's name when it has none."""
    message = str(error).strip()
    return message.splitlines()[0].rstrip(".:") if message else type(error).__name__


class Decompressed:
    """The text of a compressed file, as bytes, from its start. Raises Damaged, and OSError for what is no damage."""

    def __init__(self, path: Path, codec: str) -> None:
        import pyarrow

        self.path = path
        self.position = 0
        """Bytes of text before those that come next."""
        self._file = path.open("rb")
        self._stream: Any
        if codec == "xz":
            # Arrow has no codec for it.
            self._stream = lzma.LZMAFile(self._file)  # noqa: SIM115
        else:
            self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(self._file, mode="r"), codec)
        self._left = b""

    def chunks(self) -> Iterator[bytes]:
        """What is left, in blocks of at most `CHUNK` bytes."""
        while block := self._next():
            self.position += len(block)
            yield block

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start to stop of the text; start is not before `position`, fewer come only where the text ends."""
        parts, begun = [], start
        while begun < stop and (block := self._next()):
            first, last = self.position, self.position + len(block)
            if last > stop:
                self._left = block[stop - first :]
                last = stop
            parts.append(block[max(begun - first, 0) : last - first])
            self.position, begun = last, max(begun, last)
        return b"".join(parts)

    def close(self) -> None:
        self._file.close()

    def _next(self) -> bytes:
        block, self._left = self._left, b""
        if block:
            return block
        try:
            return bytes(self._stream.read(CHUNK))
        except Exception as error:
            if is_damage(error):
                raise Damaged(f"{self.path} is damaged or cut short ({first_line(error)})") from error
            raise
