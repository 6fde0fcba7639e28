"""Bytes to text, by one policy for every format: what is no text becomes U+FFFD and is reported, never an exception."""

from __future__ import annotations

import codecs
import io
import json
import tokenize
from functools import lru_cache

from pipeline.data.sources.base import Document

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MISNAMED = (
    (b"\x1f\x8b", "is gzip data, which its name does not say: call it .gz"),
    (b"\x28\xb5\x2f\xfd", "is zstd data, which its name does not say: call it .zst"),
    (b"PAR1", "is a parquet file, which its name does not say: call it .parquet"),
    (b"PK\x03\x04", "is a zip archive: unpack it"),
    (b"version https://git-lfs.github.com/spec/", "is a pointer of Git LFS, not the data: run `git lfs pull`"),
)
_NO_LINES = "is UTF-16 or UTF-32 text, whose lines cannot be told apart: save it as UTF-8"
MARK_BYTES = max(len(mark) for mark, _ in _MISNAMED)
# As floats, integers of any length are read; none of them is used.
_DECODER = json.JSONDecoder(parse_int=float)
_SHOWN_KEYS, _SHOWN_CHARACTERS = 8, 40


def misnamed(head: bytes, *, lines: bool = False) -> str | None:
    """What a file whose name says text or JSON `lines` really is, by its first `MARK_BYTES` bytes, and what to do."""
    if lines and head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        return _NO_LINES
    return next((what for mark, what in _MISNAMED if head.startswith(mark)), None)


def decode_utf8(data: bytes) -> tuple[str, bool]:
    """Text in UTF-8, and whether bytes of it are read as U+FFFD."""
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        return data.decode(errors="replace"), True


def decode(data: bytes) -> tuple[str, bool]:
    """The text of a whole file: `decode_utf8`, or the encoding that its byte order mark declares."""
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), None)
    if encoding is None:
        return decode_utf8(data)
    try:
        return data.decode(encoding), False
    except UnicodeDecodeError:
        return data.decode(encoding, errors="replace"), True


def decode_python(data: bytes) -> tuple[str, bool]:
    """A Python file by the coding that its first lines declare.

    One that does not exist, does not fit the bytes or would change plain ASCII is not followed: the file is read as
    other text is, and counts as undecodable.
    """
    try:
        declared = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
        if declared in ("utf-8", "utf-8-sig"):
            return decode(data)
        if _keeps_ascii(declared):
            return well_formed(data.decode(declared))
    except (SyntaxError, ValueError, LookupError):
        pass
    return decode(data)[0], True


@lru_cache
def _keeps_ascii(encoding: str) -> bool:
    """Whether plain ASCII, escapes included, reads as itself; false also for what is no text encoding."""
    probe = bytes(range(0x20, 0x7F)).replace(b"\\", b"") + rb"\x41\u0041" + b"\t\n"
    return probe.decode(encoding) == probe.decode("ascii")


def well_formed(text: str) -> tuple[str, bool]:
    """`text` with half surrogate pairs, which no tokenizer takes, as U+FFFD, and whether there was one."""
    try:
        text.encode()
        return text, False
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), True


def parse_record(line: bytes, field: str, name: str, place: str | None = None) -> Document:
    """The text in `field` of a JSON object; a blank line is an empty document.

    `name` is the document's, `place` the file and row that a problem names; the name when None.
    """
    place = place or name
    line = line.removeprefix(codecs.BOM_UTF8)
    if not line.strip():
        return Document(name, "")
    decoded, undecodable = decode_utf8(line.rstrip(b"\r\n"))
    try:
        record = _DECODER.decode(decoded)
    except RecursionError:
        return Document(name, "", f"{place} is nested too deep for the JSON parser")
    except ValueError as error:
        return Document(name, "", f"{place} is not JSON ({error})")
    if not isinstance(record, dict):
        return Document(name, "", f"{place} is not a JSON object (one per line is expected)")
    if field not in record:
        found = ", ".join(repr(key[:_SHOWN_CHARACTERS]) for key in list(record)[:_SHOWN_KEYS]) or "none"
        more = ", ..." if len(record) > _SHOWN_KEYS else ""
        return Document(name, "", f"{place} has no field {field!r} (it has {found}{more}; see --data.text-field)")
    if record[field] is None:
        return Document(name, "")
    if not isinstance(record[field], str):
        return Document(name, "", f"{place}: {field!r} is not text (see --data.text-field)")
    text, halves = well_formed(record[field])
    return Document(name, text, undecodable=halves or (undecodable and "\ufffd" in text))
