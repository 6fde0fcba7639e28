"""Conversations of a data set of Hugging Face, such as UltraChat, as documents."""

from __future__ import annotations

from typing import Any

from pipeline.data.sources.base import Document
from pipeline.data.sources.huggingface import HuggingFaceStream
from pipeline.data.sources.text import well_formed

MESSAGES = "messages"
"""The column of a chat data set: a list of messages, each with its `content`."""
TEXT = "text"
"""The field of files' records that the text is in where `MESSAGES` is asked for."""


class Conversations(HuggingFaceStream):
    """A data set (`NAME`, `NAME@REVISION` or a local folder) whose column `text_field` holds lists of messages: the
    contents of a conversation's messages, joined by newlines, are one document."""

    def _rows_of(self, builder: Any) -> tuple[Any, Any]:
        # As the library reads them: the column is no text.
        return builder.as_streaming_dataset(split=self.split), None

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
