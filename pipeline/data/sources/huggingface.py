"""Hugging Face data sets in streaming mode: names, settings, columns, identity."""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.data.sources.base import Document, Documents, Order, digest
from pipeline.data.sources.compressed import first_line
from pipeline.data.sources.content import hash_files
from pipeline.data.sources.listing import is_saved_to_disk, saved_to_disk
from pipeline.data.sources.streamed import INTERLEAVED_SHARDS, StreamedDocuments
from pipeline.data.sources.text import well_formed
from pipeline.errors import UserError
from pipeline.files.given_path import expanded

_COMMIT = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")


class HuggingFaceStream:
    """A data set of the Hub (`NAME`, `NAME:SUBSET`, either with @REVISION) or a local folder, read as it is needed."""

    def __init__(
        self,
        dataset: str,
        *,
        config_name: str | None = None,
        split: str = "train",
        text_field: str = "text",
        data_files: str | list[str] | None = None,
        shuffle_buffer: int = 1000,
        skip: bool = False,
    ) -> None:
        self.name, self.split, self.text_field, self.shuffle_buffer = dataset, split, text_field, shuffle_buffer
        folder = expanded(dataset)
        self._local = folder.exists()
        named, _, revision = (str(folder), "", "") if self._local else dataset.partition("@")
        self._path, _, subset = (named, "", "") if self._local else named.partition(":")
        self._config_name, self._skip = subset or config_name, skip
        if self._local and folder.is_dir() and is_saved_to_disk(set(os.listdir(folder))):
            raise saved_to_disk(f"--data.dataset {dataset}")
        self._builder, self.data, self._read_row = self._load(data_files, revision or None)
        self._check_first_row()

    def _load(self, data_files: str | list[str] | None, revision: str | None) -> tuple[Any, Any, Any]:
        import datasets

        try:
            builder = datasets.load_dataset_builder(
                self._path, self._config_name, data_files=data_files, revision=revision
            )
            data, read_row = self._rows_of(builder)
            columns = data.column_names if read_row is None else None
            if columns and self.text_field in columns:
                data = data.select_columns([self.text_field])
        except TypeError as error:
            raise self._no_text(str(error)) from error
        except Exception as error:  # the library raises many kinds for a wrong name, subset or split and a dead network
            raise UserError(
                f"--data.dataset {self.name} (split {self.split!r}) cannot be read: {first_line(error)}; check the"
                " name, --data.dataset-config, --data.split and the network, or give local documents with --data.path"
            ) from error
        if columns and self.text_field not in columns:
            raise self._no_text(f"has no column {self.text_field!r} (it has {', '.join(map(repr, columns))})")
        return builder, data, read_row

    def _rows_of(self, builder: Any) -> tuple[Any, Any]:
        """The streaming data set of a builder, and the function that reads its rows; None where they are as the library
        reads them. Raises TypeError, with a message for the user, for a column that is missing or no text."""
        from pipeline.data.sources.hub_rows import record_stream

        return record_stream(builder, self.split, self.text_field)

    def _check_first_row(self) -> None:
        """A wrong field or format shows before training starts."""
        if self._read_row is None or self._skip:
            return
        try:
            row = next(iter(self.data), None)
        except Exception as error:
            raise self.broken_off(error) from error
        problem = None if row is None else self._read_row(row).problem
        if problem is not None:
            raise UserError(f"--data.dataset {self.name}: {problem}: {self.remedy}")

    @property
    def remedy(self) -> str:
        skip = "pass over such records with --data.on-bad-record skip"
        if self._has_local_files:
            return f"correct the record where it stands, and the same command goes on; or {skip}"
        return skip

    def open(self, order: Order) -> Documents:
        return StreamedDocuments(self, order)

    def fingerprint(self) -> dict[str, Any]:
        """Name, settings that decide the order, and files: by content where they are local, by commit on the Hub.

        The commit stands by itself: it is the @REVISION that gives a moved data set back.
        """
        return {
            **({"revision": self._commit} if self._commit else {}),
            "dataset": Path(self._path).name if self._local else self._path,
            "config": self._config_name,
            "split": self.split,
            "text_field": self.text_field,
            "shuffle_buffer": self.shuffle_buffer,
            "interleaved": INTERLEAVED_SHARDS,
            "shards": self.data.num_shards,
            "files": self._files,
        }

    def same_documents(self, saved: dict[str, Any]) -> bool:
        return saved == self.fingerprint()

    def same_numbering(self, saved: dict[str, Any]) -> bool:
        # What is on the Hub would have to be read there again, from its first row.
        current = self.fingerprint()
        return self._has_local_files and all(saved.get(key) == current[key] for key in current if key != "files")

    @property
    def _groups(self) -> list[Any]:
        """The data files of the split, as the library resolved them; of all splits where it does not list this one."""
        listed = self._builder.config.data_files or {}
        return [listed[self.split]] if self.split in listed else list(listed.values())

    @cached_property
    def _commit(self) -> str:
        """The commits of the Hub that the files are read at; they stay the same for as long as this run lasts."""
        files = (str(file) for group in self._groups for file in group)
        return ", ".join(sorted({found[1] for file in files if (found := _COMMIT.match(file))}))

    @cached_property
    def _files(self) -> str:
        groups = self._groups
        files = [str(file) for group in groups for file in group]
        if self._has_local_files:
            try:
                return hash_files([(Path(file).name, Path(file)) for file in files])
            except OSError as error:
                raise UserError(f"--data.dataset {self.name} cannot be read: {first_line(error)}") from error
        origins = [str(origin) for group in groups for origin in group.origin_metadata]
        return f"{digest(self._builder.hash, *files, *origins):016x}"

    @cached_property
    def _has_local_files(self) -> bool:
        files = [str(file) for group in self._groups for file in group]
        return bool(files) and all(Path(file).is_file() for file in files)

    def describe(self) -> str:
        return f"{self.name}, split {self.split!r}, streamed: {self.data.num_shards:,} shards"

    def document(self, row: dict[str, Any], number: int) -> Document:
        """The document of a row, the `number`-th that its reader gives."""
        if self._read_row is not None:
            return self._read_row(row)
        if self.text_field not in row:
            raise self._no_text(f"has a row without {self.text_field!r} (it has {', '.join(map(repr, row))})")
        text = row[self.text_field]
        if text is not None and not isinstance(text, str):
            raise self._no_text(f"holds {type(text).__name__} values in {self.text_field!r}, not text")
        text, halves = well_formed(text or "")
        # The library has decoded it, and leaves no other trace.
        return Document(f"{self.name} (row {number})", text, undecodable=halves or "\ufffd" in text)

    def broken_off(self, error: Exception) -> UserError:
        """What the library raised while it was reading."""
        return UserError(
            f"--data.dataset {self.name} broke off ({first_line(error)}): resume the run when it can be read again"
        )

    def _no_text(self, what: str) -> UserError:
        return UserError(f"--data.dataset {self.name} {what}: name the text with --data.text-field")
