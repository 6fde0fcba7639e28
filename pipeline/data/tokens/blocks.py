"""Blocks of files behind URLs, on disk."""

from __future__ import annotations

import functools
import os
import tempfile
import threading
from pathlib import Path
from typing import IO, Protocol

from xxhash import xxh3_64, xxh3_128

from pipeline.data.tokens.http import Version
from pipeline.data.tokens.urls import content_of, shown_url
from pipeline.errors import UserError
from pipeline.files.given_path import expanded

BLOCK = 1 << 16
"""Bytes of a block, which is fetched by one request."""
_DIGEST = 8


def cache_folder(given: str | None) -> Path:
    """Where blocks are kept: the folder that a flag names, or else mnemos/tokens in the user's cache."""
    if given:
        return expanded(given)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(base) / "mnemos" / "tokens"


class Blocks(Protocol):
    """Blocks of one file by their numbers. Every method raises UserError where the disk fails."""

    def get(self, number: int) -> bytes | None:
        """A block; None where it is not there, or damaged."""
        ...

    def has(self, number: int) -> bool:
        """Whether a block is there; it may be damaged."""
        ...

    def put(self, number: int, content: bytes) -> None: ...


def blocks_of(url: str, version: Version, folder: Path) -> Blocks:
    """Where the blocks of a URL are: kept for later runs where its version would show a change, else for this process
    alone. Raises UserError."""
    if version.is_known:
        return KeptBlocks(url, version, folder)
    return PrivateBlocks(url, _private_file(folder))


class KeptBlocks:
    """One sparse file for a version of a URL: its bytes at their places, and after them a digest per block, 0 for one
    that is not there.

    Its name is a hash of the whole URL (less what only signs it), the size, the ETag and Last-Modified: a file that
    differs in any of these has blocks of its own. Processes may share it: a block that is half written, or damaged, has
    another digest and is fetched again. It is opened for each access, so it takes no descriptor, and may be removed at
    any time.
    """

    def __init__(self, url: str, version: Version, folder: Path) -> None:
        """Raises UserError where the folder cannot be written."""
        self._url, self._size = url, version.size
        key = (content_of(url), str(version.size), version.etag, version.modified, str(BLOCK))
        self.path = folder / f"{xxh3_128(chr(0).join(key).encode()).hexdigest()}.blocks"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644))
        except OSError as error:
            raise _no_cache(self.path.parent, url, error) from error

    def get(self, number: int) -> bytes | None:
        digest, content = self._read(number, content=True)
        return content if any(digest) and xxh3_64(content).digest() == digest else None

    def has(self, number: int) -> bool:
        digest, _ = self._read(number, content=False)
        return any(digest)

    def put(self, number: int, content: bytes) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                _write(file, content, number * BLOCK)
                _write(file, xxh3_64(content).digest(), self._size + number * _DIGEST)
            finally:
                os.close(file)
        except OSError as error:
            raise _no_cache(self.path.parent, self._url, error) from error

    def _read(self, number: int, *, content: bool) -> tuple[bytes, bytes]:
        """The digest of a block, empty where nothing was written so far, and its bytes where they are asked for."""
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                digest = os.pread(file, _DIGEST, self._size + number * _DIGEST)
                count = min(BLOCK, self._size - number * BLOCK) if content and any(digest) else 0
                return digest, os.pread(file, count, number * BLOCK)
            finally:
                os.close(file)
        except FileNotFoundError:
            return b"", b""
        except OSError as error:
            raise _no_cache(self.path.parent, self._url, error) from error


class PrivateBlocks:
    """Blocks of a URL whose server gives neither ETag nor Last-Modified: another file of the same size would not be
    noticed later, so they end with the process. They lie in one file of the process, which has no name."""

    def __init__(self, url: str, file: _PrivateFile) -> None:
        self._url, self._file = url, file
        self._places: dict[int, tuple[int, int, bytes]] = {}
        """Start, length and digest of each."""

    def get(self, number: int) -> bytes | None:
        if number not in self._places:
            return None
        start, count, digest = self._places[number]
        content = os.pread(self._file.handle.fileno(), count, start)
        return content if xxh3_64(content).digest() == digest else None

    def has(self, number: int) -> bool:
        return number in self._places

    def put(self, number: int, content: bytes) -> None:
        try:
            start = self._file.append(content)
        except OSError as error:
            raise _no_cache(self._file.folder, self._url, error) from error
        self._places[number] = (start, len(content), xxh3_64(content).digest())


class _PrivateFile:
    """A file without a name, for blocks of any URL."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._end, self._lock = folder, 0, threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.handle: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"{folder} cannot keep blocks of URLs ({error.strerror or error}): name another folder with"
                " --data.token-cache"
            ) from error

    def append(self, content: bytes) -> int:
        """Where the content begins. Raises OSError."""
        with self._lock:
            start = self._end
            self._end += len(content)
        _write(self.handle.fileno(), content, start)
        return start


@functools.cache
def _private_file(folder: Path) -> _PrivateFile:
    return _PrivateFile(folder)


def _write(file: int, content: bytes, start: int) -> None:
    """All of it: a disk that fills up takes a part."""
    done = 0
    while done < len(content):
        done += os.pwrite(file, content[done:], start + done)


def _no_cache(folder: Path, url: str, error: OSError) -> UserError:
    return UserError(
        f"{folder} cannot keep blocks of {shown_url(url)} ({error.strerror or error}): name another folder with"
        " --data.token-cache"
    )
