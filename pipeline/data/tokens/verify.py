"""Checks of a token file, by name, each with what was found."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.tokens.files import COMMAND_FLAGS, DTYPES, HEAD_BYTES, Layout, count_tokens, layout_of, other_dtype
from pipeline.data.tokens.sidecar import Sidecar, read_sidecar
from pipeline.errors import UserError

_BLOCK = 16 << 20
LEAST_RATE, MOST_RATE = 1e-6, 0.5
"""End-of-document ids per id that a corpus has, without a sidecar that says how many."""


@dataclass(frozen=True)
class Check:
    """One check of one file. `ok`: None where nothing says what is right."""

    name: str
    ok: bool | None
    found: str
    fix: str = "write or download the file again"
    """Of a check that failed; "" where `found` says it."""


@dataclass(frozen=True)
class Expected:
    """What is known of files without a sidecar; None: nothing."""

    dtype: str | None = None
    vocab_size: int | None = None
    eos_id: int | None = None
    header: bool = False


@dataclass
class _Seen:
    """What one pass over a file has found."""

    largest: int = 0
    outside: int | None = None
    """The first token whose id is beyond the vocabulary."""
    ends: int = 0
    last: int | None = None
    sha256: str = ""


def verify(path: Path, expected: Expected) -> Iterator[Check]:
    """The checks of a file, as they are made. Reads every byte."""
    try:
        sidecar = read_sidecar(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except UserError as error:
        yield Check("sidecar", False, str(error), "")
        return
    except OSError as error:
        yield Check("readable", False, f"{path}: {error.strerror or error}")
        return
    dtype = sidecar.dtype if sidecar is not None else expected.dtype
    vocab_size = sidecar.vocab_size if sidecar is not None else expected.vocab_size
    eos_id = sidecar.eos_id if sidecar is not None else expected.eos_id
    if dtype is None:
        dtype = "uint16" if vocab_size is None or vocab_size <= 1 << 16 else "uint32"
    try:
        layout = layout_of(str(path), head, dtype, header=expected.header, flags=COMMAND_FLAGS)
    except UserError as error:
        yield Check("header", False, str(error), "")
        return
    yield Check("header", True, "none" if not layout.offset else f"NumPy, {layout.offset} bytes")
    yield _dtype(head, layout, expected, vocab_size, stated=sidecar is not None or layout.declared is not None)
    yield _size(path, size, layout, sidecar)
    if size - layout.offset < layout.itemsize:
        return
    try:
        seen = _read(path, layout, vocab_size, eos_id)
    except OSError as error:
        yield Check("readable", False, f"{path}: {error.strerror or error}")
        return
    yield _vocabulary(seen, vocab_size)
    yield _documents(seen, (size - layout.offset) // layout.itemsize, eos_id, sidecar)
    if sidecar is None:
        yield Check("hash", None, f"no sidecar; SHA-256 {seen.sha256}")
    else:
        same = seen.sha256 == sidecar.sha256
        found = "as in the sidecar" if same else f"is {seen.sha256}, the sidecar has {sidecar.sha256}"
        yield Check("hash", same, f"SHA-256 {found}")


def _dtype(head: bytes, layout: Layout, expected: Expected, vocab_size: int | None, *, stated: bool) -> Check:
    """`stated`: whether the file or its sidecar says its dtype."""
    if expected.dtype is not None and expected.dtype != layout.dtype:
        return Check("dtype", False, f"{layout.dtype}, not {expected.dtype}", f"leave out {COMMAND_FLAGS.dtype}")
    ids = np.frombuffer(head, DTYPES[layout.dtype], (len(head) - layout.offset) // layout.itemsize, layout.offset)
    wrong = other_dtype(ids, vocab_size)
    if wrong is None:
        return Check("dtype", True, layout.dtype)
    what, dtype = wrong
    if dtype not in DTYPES:
        return Check("dtype", False, what, "write uint32")
    if stated:
        return Check("dtype", False, what)
    return Check("dtype", False, what, f"give {COMMAND_FLAGS.dtype} {dtype}")


def _size(path: Path, size: int, layout: Layout, sidecar: Sidecar | None) -> Check:
    try:
        tokens = count_tokens(path.name, size, layout)
    except UserError as error:
        return Check("size", False, str(error), "")
    if sidecar is not None and tokens != sidecar.tokens:
        return Check("size", False, f"{tokens:,} ids, and {sidecar.tokens:,} by the sidecar: cut short or changed")
    return Check("size", tokens > 0, f"{tokens:,} ids" if tokens else "empty")


def _read(path: Path, layout: Layout, vocab_size: int | None, eos_id: int | None) -> _Seen:
    seen, state, before = _Seen(), hashlib.sha256(), 0
    with path.open("rb") as file:
        state.update(file.read(layout.offset))
        while block := file.read(_BLOCK):
            state.update(block)
            ids = np.frombuffer(block, DTYPES[layout.dtype], len(block) // layout.itemsize)
            if not len(ids):
                continue
            largest = int(ids.max())
            if vocab_size is not None and largest >= vocab_size and seen.outside is None:
                seen.outside = before + int(np.argmax(ids >= vocab_size))
            seen.largest, seen.last = max(seen.largest, largest), int(ids[-1])
            seen.ends += 0 if eos_id is None else int((ids == eos_id).sum())
            before += len(ids)
    seen.sha256 = state.hexdigest()
    return seen


def _vocabulary(seen: _Seen, vocab_size: int | None) -> Check:
    if vocab_size is None:
        return Check("vocabulary", None, f"largest id {seen.largest}; give --tokenizer or --vocab-size to check it")
    found = f"largest id {seen.largest} of a vocabulary of {vocab_size}"
    if seen.outside is not None:
        found += f", the first beyond it is token {seen.outside}"
    return Check("vocabulary", seen.outside is None, found)


def _documents(seen: _Seen, tokens: int, eos_id: int | None, sidecar: Sidecar | None) -> Check:
    if eos_id is None:
        return Check("documents", None, "give --tokenizer or --eos-id to check how often documents end")
    rate = f"{seen.ends:,} end-of-document ids ({eos_id})"
    rate += f", one per {tokens / seen.ends:,.0f} ids" if seen.ends else ""
    if sidecar is not None and seen.ends != sidecar.documents:
        return Check("documents", False, f"{rate}, and {sidecar.documents:,} documents by the sidecar")
    if seen.last != eos_id and (seen.ends or sidecar is not None):
        return Check(
            "documents", False, f"{rate}; the last document has no end: the file is cut short, or a part of one"
        )
    if sidecar is not None:
        return Check("documents", True, rate)
    # A short file may be a part of one document.
    usual = LEAST_RATE * tokens <= seen.ends <= MOST_RATE * tokens if tokens >= 1 / LEAST_RATE or seen.ends else True
    return Check("documents", usual, rate if usual else f"{rate}: that is not how often documents end; check --eos-id")
