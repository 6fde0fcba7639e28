"""Local corpora: files, folders and globs, and the Python standard library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.sources.base import Document, Documents, Order
from pipeline.data.sources.compressed import Damaged
from pipeline.data.sources.content import hash_files
from pipeline.data.sources.divided import DividedText, WholeText
from pipeline.data.sources.grouped import GROUP_CACHE, CompressedJsonLinesFile, GroupCache, ParquetFile
from pipeline.data.sources.indexed import IndexedDocuments
from pipeline.data.sources.listing import (
    JSON_SUFFIXES,
    PARQUET_SUFFIXES,
    Listing,
    LocalFile,
    file_format,
)
from pipeline.data.sources.readers import DamagedFile, FileReader, JsonLinesFile, TextFile, unreadable
from pipeline.errors import UserError

_EXCLUDED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"})
GROUPED = (ParquetFile, CompressedJsonLinesFile)
"""Readers whose rows are cheap to read a group at a time."""


class LocalFiles:
    """Documents of local files, by random access. A text file is one document, a JSON line or parquet row is one.

    A file of which no record can be read, or the first or last one cannot, is refused at once; with `skip` (of
    `--data.on-bad-record`) it counts as a record that has a problem, as do those that are found while reading.
    """

    remedy = (
        "correct the record where it stands, and the same command goes on (where one is taken out, only with"
        " --data.on-change accept); or pass over such records with --data.on-bad-record skip"
    )

    def __init__(self, listing: Listing, *, text_field: str = "text", skip: bool = False) -> None:
        self.name, self._text_field, self._notes = listing.name, text_field, listing.notes()
        cache = GroupCache()
        readers = [(file, self._reader(file.path, cache, skip)) for file in listing.files]
        self._files = [file for file, reader in readers if reader.rows]
        self._readers = [reader for _, reader in readers if reader.rows]
        if not self._readers:
            raise UserError(f"{self.name} holds no document: every file is empty")
        self._ends = np.cumsum([reader.rows for reader in self._readers], dtype=np.int64)
        grouped = [reader for reader in self._readers if isinstance(reader, GROUPED)]
        self.groups = _group_boundaries(self._readers) if grouped else None
        self.groups_per_shuffle = _groups_per_shuffle(reader.group_bytes for reader in grouped)

    def _reader(self, path: Path, cache: GroupCache, skip: bool) -> FileReader:
        found = file_format(path.name)
        assert found is not None, path
        suffix, codec = found
        try:
            if suffix in PARQUET_SUFFIXES:
                return ParquetFile(path, self._text_field, cache)
            if suffix not in JSON_SUFFIXES:
                return TextFile(path, codec)
            reader = (
                JsonLinesFile(path, self._text_field)
                if codec is None
                else CompressedJsonLinesFile(path, self._text_field, codec, cache, skip=skip)
            )
            if not skip and reader.rows:
                # A wrong field or format shows in the first record, and a file that is cut short in the last.
                self._refuse_problem(reader[0])
                self._refuse_problem(reader[reader.rows - 1])
            return reader
        except Damaged as error:
            if skip:
                return DamagedFile(path, str(error))
            raise UserError(f"{error}: restore the file, or go on with --data.on-bad-record skip") from error
        except OSError as error:
            raise unreadable(path, error) from error

    def _refuse_problem(self, document: Document) -> None:
        if document.problem is not None:
            raise UserError(f"{document.problem}: {self.remedy}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _number(self, index: int) -> int:
        """Of the file that holds a document."""
        return int(np.searchsorted(self._ends, index, side="right"))

    def identity(self, index: int) -> str:
        """That of the file that holds a document."""
        return self._files[self._number(index)].identity

    def __getitem__(self, index: int) -> Document:
        number = self._number(index)
        reader = self._readers[number]
        try:
            return reader[index - (int(self._ends[number - 1]) if number else 0)]
        except OSError as error:
            raise unreadable(reader.path, error) from error

    def parts(self) -> Iterable[tuple[str, int]]:
        return ((file.identity, reader.rows) for file, reader in zip(self._files, self._readers, strict=True))

    def readers(self) -> list[tuple[LocalFile, FileReader]]:
        """The files that hold documents, each with its reader, in the order of the documents."""
        return list(zip(self._files, self._readers, strict=True))

    def open(self, order: Order) -> Documents:
        return DividedText(self._whole, order) if len(self) == 1 else IndexedDocuments(self, order)

    @cached_property
    def _whole(self) -> WholeText:
        document = self[0]
        self._refuse_problem(document)
        return WholeText(document.name, document.text.encode(), document.undecodable)

    def describe(self) -> str:
        passed_over = f"; passed over: {self._notes}" if self._notes else ""
        counts = f"{len(self):,} documents in {len(self._files):,} files, {self._bytes / 1e6:,.1f} MB"
        return f"{self.name}: {counts}{passed_over}"

    def fingerprint(self) -> dict[str, Any]:
        counts = {"documents": len(self), "files": len(self._files), "bytes": self._bytes}
        return {**counts, "text_field": self._text_field, "digest": self._digest, "layout": self._layout}

    def same_documents(self, saved: dict[str, Any]) -> bool:
        current = self.fingerprint()
        if "layout" in saved:
            return saved == current
        # A checkpoint of an earlier version has no layout: there the size of the text column decided the order.
        parquet = [reader.largest_text() for reader in self._readers if isinstance(reader, ParquetFile)]
        known = {key: value for key, value in current.items() if key != "layout"}
        return saved == known and _groups_per_shuffle(parquet) == self.groups_per_shuffle

    def same_numbering(self, saved: dict[str, Any]) -> bool:
        return saved.get("layout") == self._layout and saved.get("text_field") == self._text_field

    @cached_property
    def _layout(self) -> str:
        """Digest of what decides which record a place means: files, rows, and the groups that are read together."""
        state = blake2b(digest_size=16)
        for identity, rows in self.parts():
            state.update(f"{identity}\0{rows}\0".encode("utf-8", "surrogateescape"))
        if self.groups is not None:
            state.update(self.groups.tobytes() + bytes([self.groups_per_shuffle]))
        return state.hexdigest()

    @cached_property
    def _bytes(self) -> int:
        with self._unreadable_refused():
            return sum(file.path.stat().st_size for file in self._files)

    @cached_property
    def _digest(self) -> str:
        with self._unreadable_refused():
            return hash_files([(file.identity, file.path) for file in self._files])

    @contextmanager
    def _unreadable_refused(self) -> Iterator[None]:
        """Raises UserError for an OSError."""
        try:
            yield
        except OSError as error:
            raise unreadable(Path(error.filename or self.name), error) from error


def _groups_per_shuffle(sizes: Iterable[int]) -> int:
    """How many groups of at most such sizes, in bytes, are shuffled and so read at a time."""
    # Half of the cache: streams that run ahead are already in the next groups.
    return int(np.clip(GROUP_CACHE // 2 // max(*sizes, 1, 1), 1, 8))


def _group_boundaries(readers: Sequence[FileReader]) -> np.ndarray:
    """A group per group of a file; files that are cheap to read in any order are joined into one group per run."""
    sizes: list[int] = []
    joined = False
    for reader in readers:
        if isinstance(reader, GROUPED):
            sizes.extend(reader.group_rows)
            joined = False
        elif joined:
            sizes[-1] += reader.rows
        else:
            sizes.append(reader.rows)
            joined = True
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))


def standard_library() -> LocalFiles:
    """The source files of this Python's standard library.

    Test suites are left out: they are machine-made tables and broken encodings in good part, and some systems do not
    install them.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files: list[LocalFile] = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _EXCLUDED_FOLDERS]
        paths = (Path(parent, name) for name in names if name.endswith(".py"))
        files.extend(LocalFile(path, path.relative_to(root).as_posix()) for path in paths)
    if not files:
        raise UserError(f"the standard library at {root} has no .py files: name documents with --data.path")
    return LocalFiles(Listing("stdlib", tuple(sorted(files, key=lambda file: file.identity)), {}))
