"""Documents inside one local file: whole text files, JSON lines, parquet rows."""

from __future__ import annotations

import io
import json
import logging
import threading
import tokenize
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.data.sources.base import Document
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".json")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES

ROW_GROUP_CACHE = 256 << 20
"""Bytes of decoded parquet row groups that a source keeps."""
_SCAN_BLOCK = 16 << 20


class FileReader(Protocol):
    """One file: `rows` documents, by row."""

    path: Path
    rows: int

    def __getitem__(self, row: int) -> Document: ...


class TextFile:
    """The whole file is one document."""

    __slots__ = ("path", "rows")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = int(path.stat().st_size > 0)

    def __getitem__(self, row: int) -> Document:
        return Document(str(self.path), decode(self.path.read_bytes(), self.path))


def decode(data: bytes, path: Path) -> str:
    """Text of a file: UTF-8, or what the first lines of a Python file declare; the rest is U+FFFD, with a warning."""
    encoding = "utf-8-sig"
    try:
        if path.suffix == ".py":
            encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
        return data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        logger.warning("%s is not valid %s (%s): undecodable bytes are read as U+FFFD", path, encoding, error)
        return data.decode("utf-8", errors="replace")


class JsonLinesFile:
    """A JSON object per line; an index of byte offsets (8 bytes per line) makes any line one seek away."""

    def __init__(self, path: Path, text_field: str) -> None:
        self.path, self._field = path, text_field
        self._starts = _line_starts(path)
        self.rows = len(self._starts)
        if self.rows:
            self[0]  # a wrong field name or format shows before training starts

    def __getitem__(self, row: int) -> Document:
        start = int(self._starts[row])
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.readline()
        try:
            record = json.loads(line) if line.strip() else {self._field: None}
        except ValueError as error:
            hint = "one JSON object per line is expected: mend or remove the line"
            raise UserError(f"{self._name(start)} is not JSON ({error}); {hint}") from error
        if not isinstance(record, dict):
            raise UserError(f"{self._name(start)} is not a JSON object: write one object per line")
        if self._field not in record:
            raise UserError(
                f"{self._name(start)} has no field {self._field!r} (it has {', '.join(map(repr, record)) or 'none'}):"
                " name the text with --data.text-field"
            )
        text = record[self._field]
        if text is not None and not isinstance(text, str):
            raise UserError(f"{self._name(start)}: {self._field!r} is not text: name the text with --data.text-field")
        return Document(f"{self.path} (byte {start})", well_formed(text or ""))

    def _name(self, start: int) -> str:
        with self.path.open("rb") as file:
            line, left = 1, start
            while left > 0:
                block = file.read(min(left, _SCAN_BLOCK))
                line += block.count(b"\n")
                left -= len(block)
        return f"{self.path}:{line}"


def well_formed(text: str) -> str:
    """`text` with half surrogate pairs, which JSON escapes can spell and no encoding can write, as U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _line_starts(path: Path) -> np.ndarray:
    """Byte offsets of the lines that are not blank."""
    starts, base, start = [], 0, 0
    with path.open("rb") as file:
        while block := file.read(_SCAN_BLOCK):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + base
            begins = np.concatenate(([start], ends[:-1] + 1)) if len(ends) else ends
            starts.append(begins[ends > begins])
            start = int(ends[-1]) + 1 if len(ends) else start
            base += len(block)
    if base > start:
        starts.append(np.array([start]))
    return np.concatenate(starts).astype(np.int64) if starts else np.empty(0, np.int64)


class RowGroupCache:
    """The text columns of recently read row groups, up to a number of bytes; shared by the files of a source."""

    def __init__(self, limit: int = ROW_GROUP_CACHE) -> None:
        self._limit, self._size = limit, 0
        self._columns: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, file: ParquetFile, group: int) -> Any:
        """Arrow column of the row group."""
        key = (file.path, group)
        with self._lock:
            if key in self._columns:
                self._columns.move_to_end(key)
                return self._columns[key]
            column = file.read_group(group)
            self._columns[key] = column
            self._size += column.nbytes
            while self._size > self._limit and len(self._columns) > 1:
                self._size -= self._columns.popitem(last=False)[1].nbytes
            return column


class ParquetFile:
    """A row per document, read a row group at a time."""

    def __init__(self, path: Path, text_field: str, cache: RowGroupCache) -> None:
        import pyarrow
        import pyarrow.parquet

        self.path, self._field, self._cache = path, text_field, cache
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                metadata, schema = file.metadata, file.schema_arrow
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from error
        if text_field not in schema.names:
            raise UserError(
                f"{path} has no column {text_field!r} (it has {', '.join(map(repr, schema.names))}):"
                " name the text with --data.text-field"
            )
        kind = schema.field(text_field).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        types = pyarrow.types
        if not any(is_text(kind) for is_text in (types.is_string, types.is_large_string, types.is_string_view)):
            raise UserError(f"{path}: column {text_field!r} is {kind}, not text: name the text with --data.text-field")
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self.group_rows = [group.num_rows for group in groups]
        self.group_bytes = max((_column_bytes(group, text_field) for group in groups), default=0)
        self._ends = np.cumsum(self.group_rows, dtype=np.int64)
        self.rows = int(metadata.num_rows)

    def __getitem__(self, row: int) -> Document:
        group = int(np.searchsorted(self._ends, row, side="right"))
        text = self._cache.get(self, group)[row - (int(self._ends[group - 1]) if group else 0)].as_py()
        return Document(f"{self.path} (row {row})", text or "")

    def read_group(self, group: int) -> Any:
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                return file.read_row_group(group, columns=[self._field]).column(0)
        except (OSError, ValueError) as error:
            raise unreadable(self.path, error) from error


def _column_bytes(group: Any, name: str) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == name)


def unreadable(path: Path, error: Exception) -> UserError:
    """The file is there but cannot be read as what its name says."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(f"{path} cannot be read ({reason}): check or remove the file")
