"""Documents in files that are read a group of rows at a time: parquet, and compressed JSON lines."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.data.sources.base import Document
from pipeline.data.sources.compressed import Damaged, Decompressed, first_line, is_damage
from pipeline.data.sources.readers import FileReader, line_starts
from pipeline.data.sources.text import decode_utf8, parse_record
from pipeline.errors import UserError

GROUP_CACHE = 256 << 20
"""Bytes of decoded groups that a source keeps."""
GROUP_BYTES = 32 << 20
"""Bytes of text that a group of a compressed file has about."""


class Group(Protocol):
    """Rows that were decoded together."""

    @property
    def nbytes(self) -> int: ...


class GroupedFile(FileReader, Protocol):
    """A file whose rows lie in groups that are cheap to read together."""

    group_rows: list[int]
    group_bytes: int
    """Bytes of the largest group when it is decoded; for a compressed file, what it aims at."""

    def read_group(self, group: int) -> Group: ...


class GroupCache:
    """Recently read groups, up to a number of bytes; shared by the files of a source and by its threads."""

    def __init__(self, limit: int = GROUP_CACHE) -> None:
        self._limit, self._size = limit, 0
        self._groups: OrderedDict[tuple[Path, int], Group] = OrderedDict()
        self._lock = threading.Lock()
        self._open: Decompressed | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process: an empty one."""
        return GroupCache, (self._limit,)

    def get(self, file: GroupedFile, group: int) -> Any:
        """The group as the file's `read_group` gives it."""
        key = (file.path, group)
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key]
            found = file.read_group(group)
            self._groups[key] = found
            self._size += found.nbytes
            while self._size > self._limit and len(self._groups) > 1:
                self._size -= self._groups.popitem(last=False)[1].nbytes
            return found

    def text(self, path: Path, codec: str, start: int, stop: int) -> bytes:
        """Bytes of a compressed file's text. Goes on where the last call ended when it can; `get` holds the lock."""
        if self._open is None or self._open.path != path or self._open.position > start:
            if self._open is not None:
                self._open.close()
            self._open = Decompressed(path, codec)
        try:
            return self._open.read(start, stop)
        except BaseException:
            self._open.close()
            self._open = None
            raise


@dataclass(frozen=True)
class _Broken:
    """A group that cannot be read."""

    problem: str
    nbytes: int = 0


class ParquetFile:
    """A row per document, read a row group at a time."""

    def __init__(self, path: Path, text_field: str, cache: GroupCache) -> None:
        import pyarrow.parquet

        self.path, self._field, self._cache = path, text_field, cache
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                metadata, schema = file.metadata, file.schema_arrow
            self._read_layout(metadata)
        except Exception as error:
            if is_damage(error):
                raise Damaged(f"{path} cannot be read ({first_line(error)})") from error
            raise
        if text_field not in schema.names:
            raise UserError(
                f"{path} has no column {text_field!r} (it has {', '.join(map(repr, schema.names))}):"
                " name the text with --data.text-field"
            )
        kind = text_type(schema.field(text_field).type)
        if kind is not None:
            raise UserError(f"{path}: column {text_field!r} is {kind}, not text: name the text with --data.text-field")

    def _read_layout(self, metadata: Any) -> None:
        # Not a group's columns: Arrow ends the process where the description of one is damaged.
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self.group_rows = [group.num_rows for group in groups]
        self.rows = int(metadata.num_rows)
        # The file states its number of rows twice; a damaged one must not be taken for millions of rows.
        if min(self.group_rows, default=0) < 0 or sum(self.group_rows) != self.rows:
            raise ValueError("its parts disagree about the number of rows")
        self.group_bytes = max((group.total_byte_size for group in groups), default=0)
        self._ends = np.cumsum(self.group_rows, dtype=np.int64)

    def largest_text(self) -> int:
        """Bytes of the text column in the row group where it is largest; of a file that is known to be whole."""
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        texts = (column for column in columns if column.path_in_schema == self._field)
        return max((column.total_uncompressed_size for column in texts), default=0)

    def __getitem__(self, row: int) -> Document:
        group = int(np.searchsorted(self._ends, row, side="right"))
        name = f"{self.path} (row {row})"
        found = self._cache.get(self, group)
        if isinstance(found, _Broken):
            return Document(name, "", f"{name} cannot be read: {found.problem}")
        data = found[row - (int(self._ends[group - 1]) if group else 0)].as_buffer()
        text, undecodable = decode_utf8(data.to_pybytes()) if data is not None else ("", False)
        return Document(name, text, undecodable=undecodable)

    def read_group(self, group: int) -> Any:
        """Arrow column of a row group."""
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                column = file.read_row_group(group, columns=[self._field]).column(0)
            if pyarrow.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            if len(column) != self.group_rows[group]:
                raise ValueError(f"{len(column)} rows instead of {self.group_rows[group]}")
            return column
        except Exception as error:
            if is_damage(error):
                return _Broken(f"row group {group} is damaged ({first_line(error)})")
            raise


def text_type(kind: Any) -> Any:
    """None for an Arrow type that holds text, dictionaries of text included; else the type."""
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    types = pyarrow.types
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    return None if any(is_text(kind) for is_text in texts) else kind


@dataclass(frozen=True)
class _Lines:
    """Lines of a text: `starts` [lines + 1] are offsets in it."""

    text: bytes
    starts: np.ndarray

    @property
    def nbytes(self) -> int:
        return len(self.text) + self.starts.nbytes


class CompressedJsonLinesFile:
    """A JSON object per line of a gzip or zstd file.

    The file is decompressed once to find its lines, and then, for each group, from the start or from where the group
    before ended. With `skip`, a file that is cut short or damaged ends in one record that has a problem, in place of
    what cannot be read; without, it is refused.
    """

    def __init__(self, path: Path, text_field: str, codec: str, cache: GroupCache, *, skip: bool) -> None:
        self.path, self._field, self._codec, self._cache = path, text_field, codec, cache
        self._damage: str | None = None
        self._size = 0
        starts = line_starts(self._blocks())
        if self._damage is not None:
            if not skip:
                raise Damaged(self._damage)
            if self._ends_a_line:  # else what is there of the last line stands for the record
                starts = np.append(starts, self._size)
        self.rows = len(starts)
        # A power of two, so that a record that is corrected where it stands moves no other to another group.
        fit = GROUP_BYTES * max(self.rows, 1) // max(self._size, 1)
        self._rows_per_group = 1 << (max(fit, 1).bit_length() - 1)
        self._starts = np.append(starts, self._size)
        self.group_rows = [
            min(self._rows_per_group, self.rows - row) for row in range(0, self.rows, self._rows_per_group)
        ]
        self.group_bytes = GROUP_BYTES

    def _blocks(self) -> Iterator[bytes]:
        self._ends_a_line = True
        file = Decompressed(self.path, self._codec)
        try:
            for block in file.chunks():
                self._size, self._ends_a_line = file.position, block.endswith(b"\n")
                yield block
        except Damaged as error:
            self._damage = str(error)
        finally:
            file.close()

    def __getitem__(self, row: int) -> Document:
        name = f"{self.path} (row {row})"
        if self._damage is not None and row == self.rows - 1:
            return Document(name, "", f"{self._damage}: what follows row {row}, counted from 0")
        found = self._cache.get(self, row // self._rows_per_group)
        if isinstance(found, _Broken):
            return Document(name, "", f"{name} cannot be read: {found.problem}")
        index = row % self._rows_per_group
        line = found.text[found.starts[index] : found.starts[index + 1]]
        return parse_record(line, self._field, name)

    def read_group(self, group: int) -> _Lines | _Broken:
        first = group * self._rows_per_group
        starts = self._starts[first : first + self.group_rows[group] + 1]
        start, stop = int(starts[0]), int(starts[-1])
        try:
            text = self._cache.text(self.path, self._codec, start, stop)
        except Damaged as error:
            return _Broken(str(error))
        if len(text) != stop - start:
            return _Broken("the file has changed while it was being read")
        return _Lines(text, starts - start)
