"""Fingerprints of files by content."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

_HASHED_WHOLE = 1 << 30
_SAMPLE_BLOCK, _SAMPLES = 64 << 10, 16


def hash_files(files: Sequence[tuple[str, Path]]) -> str:
    """Digest of (identity, file) pairs: names, sizes and contents.

    Above 1 GiB in all, a file counts with its size and 16 evenly spaced blocks of 64 KiB, first and last included.
    """
    sizes = [path.stat().st_size for _, path in files]
    state = blake2b(digest_size=16)
    for (identity, path), size in zip(files, sizes, strict=True):
        state.update(f"{identity}\0{size}\0".encode("utf-8", "surrogateescape"))
        _hash_content(path, size, state, whole=sum(sizes) <= _HASHED_WHOLE)
    return state.hexdigest()


def _hash_content(path: Path, size: int, state: Any, *, whole: bool) -> None:
    with path.open("rb") as file:
        if whole or size <= _SAMPLE_BLOCK * _SAMPLES:
            while block := file.read(_SAMPLE_BLOCK * _SAMPLES):
                state.update(block)
            return
        for sample in range(_SAMPLES):
            file.seek((size - _SAMPLE_BLOCK) * sample // (_SAMPLES - 1))
            state.update(file.read(_SAMPLE_BLOCK))
