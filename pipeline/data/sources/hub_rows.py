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

COLUMNS = ("data", "file", "row", "problem")
_READ_AHEAD = 1 << 20
"""Bytes of JSON lines that are read at a time; of a file that is cut short, as much may be lost."""

Tables = Iterator[tuple[Any, Any]]
ReadRow = Callable[[dict[str, Any]], Document]


def take_rows(builder: Any, split: str, field: str) -> tuple[Any, ReadRow | None]:
    """The streaming data set of a builder, and what reads its rows; None where they are the library's own.

    Raises TypeError with a sentence when a parquet column is missing or no text, and whatever the library raises.
    """
    read: ReadRow
    download = DownloadConfig(token=builder.token, storage_options=builder.storage_options)
    if isinstance(builder, Json):
        builder._generate_tables = _json_tables(field, download)
        read = partial(_json_document, field)
    elif isinstance(builder, Parquet):
        features = builder.as_streaming_dataset(split=split).features
        if field not in features:
            raise TypeError(f"has no column {field!r} (it has {', '.join(map(repr, features))})")
        kind = text_type(features.arrow_schema.field(field).type)
        if kind is not None:
            raise TypeError(f"holds {kind} values in {field!r}, not text")
        builder._cast_table = lambda table: table
        builder._generate_tables = _parquet_tables(builder._generate_tables, download)
        read = _parquet_document
    else:
        if getattr(builder.config, "encoding_errors", "") is None:
            builder.config.encoding_errors = "replace"
        return builder.as_streaming_dataset(split=split), None
    # Given beforehand, so that the library does not look for them.
    kinds = zip(COLUMNS, ("large_binary", "string", "int64", "string"), strict=True)
    builder.info.features = Features({name: Value(kind) for name, kind in kinds})
    data = builder.as_streaming_dataset(split=split).select_columns(list(COLUMNS))
    if isinstance(builder, Parquet):
        builder.config.columns = [field]
    return data, read


def _json_document(field: str, row: dict[str, Any]) -> Document:
    name = f"{row['file']}:{row['row']}"
    if row["problem"] is not None:
        return Document(name, "", f"{name} {row['problem']}")
    return parse_record(row["data"], field, name, lambda: name)


def _parquet_document(row: dict[str, Any]) -> Document:
    name = f"{row['file']} (row {row['row']})"
    if row["problem"] is not None:
        return Document(name, "", f"{name} {row['problem']}")
    text, undecodable = decode_utf8(row["data"] or b"")
    return Document(name, text, undecodable=undecodable)


def _table(data: Any, file: str, rows: Sequence[int], problem: str | None = None) -> Any:
    """Arrow table of `data` and where it stands."""
    names, problems = [file] * len(rows), [problem] * len(rows)
    kinds = (pyarrow.large_binary(), pyarrow.string(), pyarrow.int64(), pyarrow.string())
    columns = [pyarrow.array(data, kinds[0]) if isinstance(data, list) else data.cast(kinds[0])]
    columns += [pyarrow.array(values, kind) for values, kind in zip((names, rows, problems), kinds[1:], strict=True)]
    return pyarrow.table(dict(zip(COLUMNS, columns, strict=True)))


def _broken(file: str, row: int, error: Exception) -> Any:
    return _table([None], file, [row], f"cannot be read, nor what follows it ({first_line(error)})")


def _json_tables(field: str, download: Any) -> Callable[..., Tables]:
    """What stands for the library's `_generate_tables`."""

    def generate(files_iterables: Sequence[Iterable[str]], base_files: Sequence[str], original_files: Any) -> Tables:
        for shard, (base, files) in enumerate(zip(base_files, files_iterables, strict=True)):
            batches = count()
            for file in [base] if base.endswith(".zst") else files:
                name, row = file.rpartition("::")[2], 1
                try:
                    with _open(file, download) as handle:
                        for rows, lines in _lines(handle, field):
                            yield Key(shard, next(batches)), _table(lines, name, rows)
                            row = rows[-1] + 1
                except Exception as error:
                    if not is_damage(error):
                        raise
                    yield Key(shard, next(batches)), _broken(name, row, error)

    return generate


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


def _lines(handle: Any, field: str) -> Iterator[tuple[list[int], list[bytes]]]:
    """Numbers, from 1, and content of the lines that are not blank; of a file that is one array, its elements'."""
    number, block = 1, handle.read(_READ_AHEAD)
    if block.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        elements = json.loads(decode_utf8((block + handle.read()).removeprefix(codecs.BOM_UTF8))[0])
        records = [{field: element} if isinstance(element, str) else element for element in elements]
        if records:
            yield list(range(1, len(records) + 1)), [json.dumps(record).encode() for record in records]
        return
    while block:
        if not block.endswith(b"\n"):
            block += handle.readline()
        lines = block.removesuffix(b"\n").split(b"\n")
        kept = [(row, line) for row, line in enumerate(lines, start=number) if line.strip()]
        if kept:
            yield [row for row, _ in kept], [line for _, line in kept]
        number, block = number + len(lines), handle.read(_READ_AHEAD)


def _parquet_tables(original: Callable[..., Tables], download: Any) -> Callable[..., Tables]:
    """The same around the library's own. Of a damaged file, each row group that can be read is; of the others, each is
    one record that has a problem, wherever the library noticed it."""

    def generate(files: Sequence[str], row_groups_list: Sequence[Any]) -> Tables:
        for shard, (file, groups) in enumerate(zip(files, row_groups_list, strict=True)):
            row, batches = 0, count()
            try:
                for _, table in original(files=[file], row_groups_list=[groups]):
                    yield Key(shard, next(batches)), _table(table.column(0), file, range(row, row + len(table)))
                    row += len(table)
            except Exception as error:
                if not is_damage(error):
                    raise
                for table in _groups_one_by_one(original, download, file, done=row):
                    yield Key(shard, next(batches)), table

    return generate


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
                    yield _table(column[max(done - start, 0) :], file, range(max(start, done), start + len(column)))
                except Exception as error:
                    if not is_damage(error):
                        raise
                    yield _broken(file, start, error)
            start += size
    except Exception as error:
        if not is_damage(error):
            raise
        yield _broken(file, start, error)
