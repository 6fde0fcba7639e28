"""Fingerprints of files by content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

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
    samples = samples or sum(file.size for _, file in files) > _HASHED_WHOLE
    for identity, file in files:
        state.update(f"{identity}\0{file.size}\0".encode("utf-8", "surrogateescape"))
        for start, count in places_read(file.size, samples=samples):
            state.update(file.content(start, count))
    return state.hexdigest()


def places_read(size: int, *, samples: bool) -> Iterator[tuple[int, int]]:
    """(start, count) of what is read of a file of `size` bytes for its digest: with `samples`, of one above 1 MiB, 16
    evenly spaced blocks, first and last included."""
    step = _SAMPLE_BLOCK * _SAMPLES
    if not samples or size <= step:
        return ((start, min(step, size - start)) for start in range(0, size, step))
    return (((size - _SAMPLE_BLOCK) * sample // (_SAMPLES - 1), _SAMPLE_BLOCK) for sample in range(_SAMPLES))
