"""Documents inside one plain local file: whole text files and JSON lines; what all kinds of files share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np

from pipeline.data.sources.base import Document
from pipeline.data.sources.compressed import Damaged, Decompressed, first_line
from pipeline.data.sources.text import MARK_BYTES, decode, decode_python, misnamed, parse_record
from pipeline.errors import UserError

_SCAN_BLOCK = 16 << 20
_TINY = 512
"""Bytes below which a text file may be a mere pointer to the data, and is looked into at once."""


class FileReader(Protocol):
    """One file: `rows` documents, by row."""

    path: Path
    rows: int

    def __getitem__(self, row: int) -> Document: ...


class TextFile:
    """The whole file is one document. `codec`: how it is compressed; None: not at all."""

    __slots__ = ("_codec", "path", "rows")

    def __init__(self, path: Path, codec: str | None = None) -> None:
        self.path, self._codec = path, codec
        if codec is not None:
            self.rows = int(any(self._blocks()))
            return
        size = path.stat().st_size
        self.rows = int(size > 0)
        if 0 < size < _TINY:
            check_name(path)

    def _blocks(self) -> Iterator[bytes]:
        assert self._codec is not None
        file = Decompressed(self.path, self._codec)
        try:
            yield from file.chunks()
        finally:
            file.close()

    def __getitem__(self, row: int) -> Document:
        name = str(self.path)
        if self._codec is None:
            data = self.path.read_bytes()
            wrong = misnamed(data[:MARK_BYTES])
            if wrong is not None:
                return Document(name, "", f"{name} {wrong}")
        else:
            try:
                data = b"".join(self._blocks())
            except Damaged as error:
                return Document(name, "", str(error))
        name_of_text = self.path.stem if self._codec is not None else self.path.name
        python = name_of_text.lower().endswith(".py")
        text, undecodable = decode_python(data) if python else decode(data)
        return Document(name, text, undecodable=undecodable)


class JsonLinesFile:
    """A JSON object per line; an index of byte offsets (8 bytes per line) makes any line one seek away."""

    def __init__(self, path: Path, text_field: str) -> None:
        self.path, self._field = path, text_field
        check_name(path, lines=True)
        with path.open("rb") as file:
            self._as_indexed = _size_and_time(file.fileno())
            self._starts = line_starts(iter(partial(file.read, _SCAN_BLOCK), b""))
        self.rows = len(self._starts)

    def __getitem__(self, row: int) -> Document:
        start = int(self._starts[row])
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.readline()
            # The file has changed, so the offsets of its index no longer are starts of lines.
            if _size_and_time(file.fileno()) != self._as_indexed and not line.strip():
                self._changed()
            name = f"{self.path} (byte {start})"
            found = parse_record(line, self._field, name)
            if found.problem is not None:
                # Only a problem needs the line's number: everything before the line is read for it.
                found = parse_record(line, self._field, name, self._place(start))
                if _size_and_time(file.fileno()) != self._as_indexed:
                    self._changed()
        return found

    def _changed(self) -> NoReturn:
        raise UserError(f"{self.path} has changed while it was being read: start again when it is written")

    def _place(self, start: int) -> str:
        with self.path.open("rb") as file:
            line, left = 1, start
            while left > 0 and (block := file.read(min(left, _SCAN_BLOCK))):
                line += block.count(b"\n")
                left -= len(block)
        return f"{self.path}:{line}"


class DamagedFile:
    """A file that cannot be read at all: one record that has a problem."""

    rows = 1

    def __init__(self, path: Path, problem: str) -> None:
        self.path, self._problem = path, problem

    def __getitem__(self, row: int) -> Document:
        return Document(str(self.path), "", self._problem)


def line_starts(blocks: Iterable[bytes]) -> np.ndarray:
    """Byte offsets [lines] int64 of the lines that are not blank, in a text that comes in blocks."""
    starts, base, start = [], 0, 0
    for block in blocks:
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + base
        begins = np.concatenate(([start], ends[:-1] + 1)) if len(ends) else ends
        starts.append(begins[ends > begins])
        start = int(ends[-1]) + 1 if len(ends) else start
        base += len(block)
    if base > start:
        starts.append(np.array([start]))
    return np.concatenate(starts).astype(np.int64) if starts else np.empty(0, np.int64)


def check_name(path: Path, *, lines: bool = False) -> None:
    """Raises Damaged for an archive, or a pointer to the data, whose name says text or JSON lines."""
    with path.open("rb") as file:
        wrong = misnamed(file.read(MARK_BYTES), lines=lines)
    if wrong is not None:
        raise Damaged(f"{path} {wrong}")


def _size_and_time(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def unreadable(path: Path, error: Exception) -> UserError:
    """The file is there but cannot be read."""
    return UserError(f"{path} cannot be read ({first_line(error)}): check or remove the file")
