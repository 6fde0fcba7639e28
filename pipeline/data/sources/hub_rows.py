"""Rows of JSON and parquet files of a streamed data set, as bytes: no column but the text is looked at.

The library itself infers a type for every column from the first rows, and gives up where a later row has another; and
it gives up a whole file for one record. Which files there are, how they are opened and how a reader finds its place
again stays the library's.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import DownloadConfig, Features, Value
from datasets.builder import Key
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.utils.file_utils import xopen

from pipeline.data.sources.base import Document
from pipeline.data.sources.compressed import first_line, is_damage
from pipeline.data.sources.grouped import text_type
from pipeline.data.sources.text import decode_utf8, parse_record

_COLUMN = "record"
"""The one column that the library is given: where the record stands, what is wrong with it or nothing, its bytes, with
a NUL behind the first two. Each column costs as much time as the parsing of a short record."""
_READ_AHEAD = 1 << 20
"""Bytes of JSON lines that are read at a time; of a file that is cut short, as much may be lost."""

Tables = Iterator[tuple[Any, Any]]
ReadRow = Callable[[dict[str, Any]], Document]


def record_stream(builder: Any, split: str, field: str) -> tuple[Any, ReadRow | None]:
    """The streaming data set of a builder, and the function that reads its rows; None where the rows are the library's.

    Raises TypeError, with a message for the user, when a parquet column is missing or no text, and whatever the library
    raises.
    """
    read: ReadRow
    download = DownloadConfig(token=builder.token, storage_options=builder.storage_options)
    if isinstance(builder, Json):
        builder._generate_tables = partial(_json_tables, field, download)
        read = partial(_json_document, field)
    elif isinstance(builder, Parquet):
        features = builder.as_streaming_dataset(split=split).features
        if field not in features:
            raise TypeError(f"has no column {field!r} (it has {', '.join(map(repr, features))})")
        kind = text_type(features.arrow_schema.field(field).type)
        if kind is not None:
            raise TypeError(f"holds {kind} values in {field!r}, not text")
        builder._cast_table = _unchanged
        builder._generate_tables = partial(_parquet_tables, builder._generate_tables, download)
        read = _parquet_document
    else:
        if getattr(builder.config, "encoding_errors", "") is None:
            builder.config.encoding_errors = "replace"
        return builder.as_streaming_dataset(split=split), None
    # Given beforehand, so that the library does not look for it.
    builder.info.features = Features({_COLUMN: Value("large_binary")})
    data = builder.as_streaming_dataset(split=split).select_columns([_COLUMN])
    if isinstance(builder, Parquet):
        builder.config.columns = [field]
    return data, read


def _unchanged(table: Any) -> Any:
    return table


def _json_document(field: str, row: dict[str, Any]) -> Document:
    name, problem, data = _unpacked(row)
    return Document(name, "", problem) if problem else parse_record(data, field, name)


def _parquet_document(row: dict[str, Any]) -> Document:
    name, problem, data = _unpacked(row)
    text, undecodable = decode_utf8(data)
    return Document(name, text, problem, undecodable)


def _packed(name: str, data: bytes, problem: str = "") -> bytes:
    header = f"{name}\0{problem}\0".encode("utf-8", "surrogatepass")
    return header + data


def _unpacked(row: dict[str, Any]) -> tuple[str, str | None, bytes]:
    name, problem, data = row[_COLUMN].split(b"\0", 2)
    return name.decode("utf-8", "surrogatepass"), problem.decode("utf-8", "surrogatepass") or None, data


def _table(records: list[bytes]) -> Any:
    return pyarrow.table({_COLUMN: pyarrow.array(records, pyarrow.large_binary())})


def _broken(name: str, error: Exception) -> Any:
    message = first_line(error).replace("\0", "")
    return _table([_packed(name, b"", f"{name} cannot be read, nor what follows it ({message})")])


def _json_tables(
    field: str, download: Any, files_iterables: Sequence[Iterable[str]], base_files: Sequence[str], original_files: Any
) -> Tables:
    """Stands for the library's `_generate_tables`, with the first two arguments bound."""
    for shard, (base, files) in enumerate(zip(base_files, files_iterables, strict=True)):
        batches = count()
        for file in [base] if base.endswith(".zst") else files:
            name, row = file.rpartition("::")[2], 1
            try:
                with _open(file, download) as handle:
                    for lines in _lines(handle, field):
                        yield Key(shard, next(batches)), _table([_packed(f"{name}:{n}", line) for n, line in lines])
                        row = lines[-1][0] + 1
            except Exception as error:
                if not is_damage(error):
                    raise
                yield Key(shard, next(batches)), _broken(f"{name}:{row}", error)


@contextlib.contextmanager
def _open(file: str, download: Any) -> Iterator[Any]:
    """The bytes of a file, decompressed."""
    with xopen(file, "rb", download_config=download) as handle:
        if file.endswith(".zst"):
            # The library would need one more package for it.
            raw = pyarrow.PythonFile(handle, mode="r")
            yield io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), _READ_AHEAD)
        else:
            yield handle


def _lines(handle: Any, field: str) -> Iterator[list[tuple[int, bytes]]]:
    """Number, from 1, and content of the lines that are not blank; of a file that is one array, its elements'."""
    number, block = 1, handle.read(_READ_AHEAD)
    if block.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        elements = json.loads(decode_utf8((block + handle.read()).removeprefix(codecs.BOM_UTF8))[0])
        records = [{field: element} if isinstance(element, str) else element for element in elements]
        if records:
            yield [(number, json.dumps(record).encode()) for number, record in enumerate(records, start=1)]
        return
    while block:
        if not block.endswith(b"\n"):
            block += handle.readline()
        lines = block.removesuffix(b"\n").split(b"\n")
        kept = [(row, line) for row, line in enumerate(lines, start=number) if line.strip()]
        if kept:
            yield kept
        number, block = number + len(lines), handle.read(_READ_AHEAD)


def _parquet_tables(
    original: Callable[..., Tables], download: Any, files: Sequence[str], row_groups_list: Sequence[Any]
) -> Tables:
    """Stands for the library's `_generate_tables`, which is ``original``, with the first two arguments bound.

    Of a damaged file, every row group that can be read is read; each of the others is one record that has a problem,
    wherever the library noticed it.
    """
    for shard, (file, groups) in enumerate(zip(files, row_groups_list, strict=True)):
        row, batches = 0, count()
        try:
            for _, table in original(files=[file], row_groups_list=[groups]):
                yield Key(shard, next(batches)), _parquet_table(table.column(0), file, row)
                row += len(table)
        except Exception as error:
            if not is_damage(error):
                raise
            for table in _groups_one_by_one(original, download, file, done=row):
                yield Key(shard, next(batches)), table


def _groups_one_by_one(original: Callable[..., Tables], download: Any, file: str, done: int) -> Iterator[Any]:
    """Tables of what follows row `done` of a damaged file."""
    start = 0
    try:
        with xopen(file, "rb", download_config=download) as handle:
            metadata = pyarrow.parquet.ParquetFile(handle).metadata
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        for group, size in enumerate(sizes):
            if start + size > done:
                try:
                    tables = [table for _, table in original(files=[file], row_groups_list=[(group,)])]
                    column = pyarrow.concat_tables(tables).column(0)
                    yield _parquet_table(column[max(done - start, 0) :], file, max(start, done))
                except Exception as error:
                    if not is_damage(error):
                        raise
                    yield _broken(f"{file} (row {start})", error)
            start += size
    except Exception as error:
        if not is_damage(error):
            raise
        yield _broken(f"{file} (row {start})", error)


def _parquet_table(column: Any, file: str, first: int) -> Any:
    """The text column of rows that follow each other, from number `first` on."""
    texts = column.cast(pyarrow.large_binary()).to_pylist()
    return _table([_packed(f"{file} (row {row})", text or b"") for row, text in enumerate(texts, start=first)])
