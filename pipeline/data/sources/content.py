"""Fingerprints of files by content."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

_HASHED_WHOLE = 1 << 30
_SAMPLE_BLOCK, _SAMPLES = 64 << 10, 16


class Readable(Protocol):
    """A file, wherever it lies."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def content(self, start: int, count: int) -> bytes:
        """Bytes `start` to `start + count`, or to the end."""
        ...


class _LocalBytes:
    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size

    def content(self, start: int, count: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(count)


def hash_files(files: Sequence[tuple[str, Path]]) -> str:
    """Digest of (identity, file) pairs: names, sizes and contents.

    Above 1 GiB in all, a file counts with its size and 16 evenly spaced blocks of 64 KiB, first and last included.
    """
    return hash_contents([(identity, _LocalBytes(path)) for identity, path in files])


def hash_contents(files: Sequence[tuple[str, Readable]], *, samples: bool = False) -> str:
    """`hash_files` of files wherever they lie; with `samples`, no file above 1 MiB is read whole."""
    state = blake2b(digest_size=16)
    whole = not samples and sum(file.size for _, file in files) <= _HASHED_WHOLE
    for identity, file in files:
        state.update(f"{identity}\0{file.size}\0".encode("utf-8", "surrogateescape"))
        _hash_content(file, state, whole=whole)
    return state.hexdigest()


def _hash_content(file: Readable, state: Any, *, whole: bool) -> None:
    step = _SAMPLE_BLOCK * _SAMPLES
    if whole or file.size <= step:
        for start in range(0, file.size, step):
            state.update(file.content(start, min(step, file.size - start)))
        return
    for sample in range(_SAMPLES):
        state.update(file.content((file.size - _SAMPLE_BLOCK) * sample // (_SAMPLES - 1), _SAMPLE_BLOCK))
