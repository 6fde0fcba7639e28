"""Random mutations of valid files, for tests that feed them to a reader: the same seed gives the same mutations.

    for name, content in mutations(valid, count=200, seed=1):
        ...

`name` says which mutations were made, in order, for the message of an assertion.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

HUGE = (2**63, -(2**63) - 1, 10**40, -(10**400), 1e308, float("inf"), float("-inf"), float("nan"))
STRANGE_TEXT = (
    "",
    "\0",
    "\ud800",
    "\udfff x",
    "\u2028",
    "a" * 5000,
    "../../etc/passwd",
    "~",
    "\ufeff",
    "null",
    "1e999",
)
VALUES: tuple[Any, ...] = (None, True, False, 0, -1, 0.5, [], {}, [[]], {"": None}, [None], *HUGE, *STRANGE_TEXT)
"""What a JSON value is replaced with: every type, and the ends of each."""
PIECES = (
    *(b"\0", b"\0" * 512, b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b"\t", b" "),
    *(b"{", b"}", b"[", b"]", b'"', b"'", b",", b":", b"-", b"#", b"&a *a", b"!!python/none", b"|", b"\\ud800"),
    *(b"NaN", b"1e999", b"9" * 5000, b"\x1f\x8b", b"=", b"@"),
)
"""What is inserted between bytes."""
DEPTH = 20_000
"""Levels of nesting that no recursive parser survives unguarded."""


def _span(content: bytes, source: random.Random, longest: int) -> tuple[int, int]:
    start = source.randrange(len(content) + 1)
    return start, min(len(content), start + source.randrange(1, longest + 1))


def flip(content: bytes, source: random.Random) -> bytes:
    """Some bits of some bytes are inverted."""
    changed = bytearray(content)
    for _ in range(source.randrange(1, 5)):
        if changed:
            changed[source.randrange(len(changed))] ^= source.randrange(1, 256)
    return bytes(changed)


def insert(content: bytes, source: random.Random) -> bytes:
    """A piece that means something to some parser is put in."""
    at = source.randrange(len(content) + 1)
    return content[:at] + source.choice(PIECES) + content[at:]


def delete(content: bytes, source: random.Random) -> bytes:
    """Some bytes are missing."""
    start, end = _span(content, source, 40)
    return content[:start] + content[end:]


def truncate(content: bytes, source: random.Random) -> bytes:
    """The file is cut short."""
    return content[: source.randrange(len(content) + 1)]


def zero(content: bytes, source: random.Random) -> bytes:
    """A part, often up to the end, is NUL bytes: what a power cut leaves of blocks that were not yet written."""
    start, end = _span(content, source, 4096)
    end = source.choice((end, len(content)))
    return content[:start] + b"\0" * (end - start) + content[end:]


def repeat_line(content: bytes, source: random.Random) -> bytes:
    """A line stands twice, the second time somewhere else."""
    lines = content.splitlines(keepends=True) or [b""]
    lines.insert(source.randrange(len(lines) + 1), source.choice(lines))
    return b"".join(lines)


def drop_line(content: bytes, source: random.Random) -> bytes:
    """A line is missing."""
    lines = content.splitlines(keepends=True) or [b""]
    del lines[source.randrange(len(lines))]
    return b"".join(lines)


def nest(content: bytes, source: random.Random) -> bytes:
    """Deep nesting in place of some bytes."""
    start, end = _span(content, source, 20)
    opening, closing = source.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return content[:start] + opening * DEPTH + b"0" + closing * DEPTH + content[end:]


def swap_json_value(content: bytes, source: random.Random) -> bytes:
    """A value or key of the JSON document, or of a line of JSON lines, becomes another; other files: bytes flip."""
    lines = content.splitlines(keepends=True) or [b""]
    index = source.randrange(len(lines))
    before, after = b"".join(lines[:index]), b"".join(lines[index + 1 :])
    for start, text, end in ((b"", content, b""), (before, lines[index], after)):
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            continue
        ending = b"\n" if text.endswith(b"\n") else b""
        return start + json.dumps(_swapped(document, source)).encode() + ending + end
    return flip(content, source)


def _swapped(document: Any, source: random.Random) -> Any:
    if not isinstance(document, (dict, list)) or not document or source.random() < 0.1:
        return source.choice(VALUES)
    if isinstance(document, list):
        index = source.randrange(len(document))
        return [*document[:index], _swapped(document[index], source), *document[index + 1 :]]
    key = source.choice(list(document))
    match source.randrange(8):
        case 0:  # another name
            other = source.choice((key[:-1], key + "s", key.upper(), *STRANGE_TEXT))
            return {(other if name == key else name): value for name, value in document.items()}
        case 1:  # missing
            return {name: value for name, value in document.items() if name != key}
        case 2:  # the same value in another type
            value = document[key]
            return {**document, key: source.choice((str(value), [value], {"value": value}))}
    return {**document, key: _swapped(document[key], source)}


MUTATIONS: tuple[Mutation, ...] = (
    *(flip, insert, delete, truncate, zero, repeat_line, drop_line, nest),
    *(swap_json_value, swap_json_value, swap_json_value),
)
"""A value of JSON is what a person edits: it is drawn more often."""


def mutations(valid: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` mutants of `valid`, each of one to three mutations, with what was done to it."""
    source = random.Random(seed)
    for number in range(count):
        content, done = valid, []
        for _ in range(source.choice((1, 1, 1, 2, 3))):
            mutation = source.choice(MUTATIONS)
            content = mutation(content, source)
            done.append(mutation.__name__)
        yield f"{number}: {', '.join(done)}", content
