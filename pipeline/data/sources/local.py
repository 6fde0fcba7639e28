"""Local corpora: files, folders and globs, and the Python standard library."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.sources.base import Document, Order
from pipeline.data.sources.content import hash_files
from pipeline.data.sources.indexed import IndexedDocuments
from pipeline.data.sources.readers import (
    JSON_SUFFIXES,
    PARQUET_SUFFIXES,
    ROW_GROUP_CACHE,
    SUFFIXES,
    FileReader,
    JsonLinesFile,
    ParquetFile,
    RowGroupCache,
    TextFile,
    unreadable,
)
from pipeline.errors import UserError

_EXCLUDED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class LocalFile:
    """A file and its identity: its path below the folder that was asked for, so that the hold-out survives a move."""

    path: Path
    identity: str


class LocalFiles:
    """Documents of local files, by random access. A text file is one document, a JSON line or parquet row is one."""

    def __init__(self, files: Sequence[LocalFile], *, name: str, text_field: str = "text") -> None:
        self.name, self._text_field = name, text_field
        cache = RowGroupCache()
        readers = [(file, _reader(file.path, text_field, cache)) for file in files]
        self._files = [file for file, reader in readers if reader.rows]
        self._readers = [reader for _, reader in readers if reader.rows]
        if not self._readers:
            raise UserError(f"{name} holds no document: every file is empty")
        self._ends = np.cumsum([reader.rows for reader in self._readers], dtype=np.int64)
        parquet = [reader for reader in self._readers if isinstance(reader, ParquetFile)]
        self.groups = _group_boundaries(self._readers) if parquet else None
        largest = max((reader.group_bytes for reader in parquet), default=0)
        # Half of the cache: streams that run ahead are already in the next groups.
        self.together = int(np.clip(ROW_GROUP_CACHE // 2 // max(largest, 1), 1, 8))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Document:
        number = int(np.searchsorted(self._ends, index, side="right"))
        reader = self._readers[number]
        try:
            return reader[index - (int(self._ends[number - 1]) if number else 0)]
        except OSError as error:
            raise unreadable(reader.path, error) from error

    def parts(self) -> Iterable[tuple[str, int]]:
        return ((file.identity, reader.rows) for file, reader in zip(self._files, self._readers, strict=True))

    def open(self, order: Order) -> IndexedDocuments:
        return IndexedDocuments(self, order)

    def describe(self) -> str:
        return f"{self.name}: {len(self):,} documents in {len(self._files):,} files, {self._bytes / 1e6:,.1f} MB"

    def fingerprint(self) -> dict[str, Any]:
        counts = {"documents": len(self), "files": len(self._files), "bytes": self._bytes}
        return {**counts, "text_field": self._text_field, "digest": self._digest}

    @cached_property
    def _bytes(self) -> int:
        return sum(file.path.stat().st_size for file in self._files)

    @cached_property
    def _digest(self) -> str:
        try:
            return hash_files([(file.identity, file.path) for file in self._files])
        except OSError as error:
            raise unreadable(Path(error.filename or self.name), error) from error


def _reader(path: Path, text_field: str, cache: RowGroupCache) -> FileReader:
    suffix = path.suffix.lower()
    try:
        if suffix in JSON_SUFFIXES:
            return JsonLinesFile(path, text_field)
        if suffix in PARQUET_SUFFIXES:
            return ParquetFile(path, text_field, cache)
        return TextFile(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _group_boundaries(readers: Sequence[FileReader]) -> np.ndarray:
    """A group per parquet row group; files that are cheap to read in any order are joined into one group per run."""
    sizes: list[int] = []
    joined = False
    for reader in readers:
        if isinstance(reader, ParquetFile):
            sizes.extend(reader.group_rows)
            joined = False
        elif joined:
            sizes[-1] += reader.rows
        else:
            sizes.append(reader.rows)
            joined = True
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))


def local_files(paths: Sequence[str], text_field: str = "text") -> LocalFiles:
    """The corpus that `--data.path` names: files, folders (searched to the bottom) and globs, each in sorted order."""
    found: dict[Path, LocalFile] = {}
    for given in paths:
        for file in _expand(given):
            found.setdefault(file.path.resolve(), file)
    shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    return LocalFiles(list(found.values()), name=shown, text_field=text_field)


def _expand(given: str) -> list[LocalFile]:
    path = Path(given).expanduser()
    if path.is_dir():
        files = _below(path, path)
        if not files:
            raise UserError(f"--data.path {given} holds no {_listed(SUFFIXES)} file: name another folder")
        return files
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"--data.path {given} ends in {path.suffix!r}: {_listed(SUFFIXES)} files can be read")
        if path.stat().st_size == 0:
            raise UserError(f"--data.path {given} is empty: name a file with documents")
        return [LocalFile(path, path.name)]
    if glob.has_magic(given):
        root = _fixed_part(path)
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = []
        for match in matches:
            if "__pycache__" in match.parts:
                continue
            if match.is_dir():
                files.extend(_below(match, root))
            elif match.suffix.lower() in SUFFIXES:
                files.append(LocalFile(match, match.relative_to(root).as_posix()))
        if files:
            return files
        raise UserError(f"--data.path {given} matches no {_listed(SUFFIXES)} file: check the pattern")
    raise UserError(f"--data.path {given} does not exist: check the path")


def _below(folder: Path, root: Path) -> list[LocalFile]:
    """Files that can be read below `folder`, sorted; hidden ones are left out."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and path.suffix.lower() in SUFFIXES:
                files.append(LocalFile(path, path.relative_to(root).as_posix()))
    return sorted(files, key=lambda file: file.identity)


def _fixed_part(pattern: Path) -> Path:
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _listed(suffixes: Sequence[str]) -> str:
    return ", ".join(suffixes[:-1]) + " or " + suffixes[-1]


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
    return LocalFiles(sorted(files, key=lambda file: file.identity), name="stdlib")
