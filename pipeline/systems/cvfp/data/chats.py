"""Conversations of a data set of Hugging Face, such as UltraChat, as documents."""

from __future__ import annotations

from typing import Any

from pipeline.data.sources.base import Document
from pipeline.data.sources.huggingface import HuggingFaceStream
from pipeline.data.sources.text import well_formed
from pipeline.errors import UserError, brief

MESSAGES = "messages"
"""The column of a chat data set: a list of messages, each with its `content`."""


class Conversations(HuggingFaceStream):
    """A data set (`NAME`, `NAME@REVISION` or a local folder) whose column `text_field` holds lists of messages: the
    contents of a conversation's messages, joined by newlines, are one document."""

    def _load(self, data_files: str | list[str] | None, revision: str | None) -> tuple[Any, Any, Any]:
        import datasets

        try:
            builder = datasets.load_dataset_builder(
                self._path, self._config_name, data_files=data_files, revision=revision
            )
            data = builder.as_streaming_dataset(split=self.split)
            columns = data.column_names
        except Exception as error:  # the library raises many kinds for a wrong name, subset or split and a dead network
            raise UserError(
                f"--data.dataset {self.name} (split {self.split!r}) cannot be read: {brief(error)}: check the name,"
                " --data.split and the network, or give local documents with --data.path"
            ) from error
        if columns and self.text_field not in columns:
            raise self._no_text(f"has no column {self.text_field!r} (it has {', '.join(map(repr, columns))})")
        return builder, data.select_columns([self.text_field]) if columns else data, None

    def document(self, row: dict[str, Any], number: int) -> Document:
        """The document of a row, the `number`-th that its reader gives; one with a problem where it is no
        conversation."""
        name = f"{self.name} (row {number})"
        messages = row.get(self.text_field)
        # Of a Sequence of structures the library makes one structure of lists.
        contents = messages.get("content") if isinstance(messages, dict) else _contents(messages)
        if not isinstance(contents, list) or not all(isinstance(content, str) for content in contents):
            problem = (
                f"{name}: {self.text_field!r} is no list of messages with a `content` each (see --data.text-field)"
            )
            return Document(name, "", problem)
        text, halves = well_formed("\n".join(contents))
        return Document(name, text, undecodable=halves or "\ufffd" in text)


def _contents(messages: Any) -> list[Any] | None:
    if not isinstance(messages, list):
        return None
    return [message.get("content") if isinstance(message, dict) else None for message in messages]
