"""One token file: raw little-endian ids, read at any place, and what is wrong with a file that is none."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from pipeline.data.sources.readers import unreadable
from pipeline.errors import UserError, brief

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
HEAD_BYTES = 1 << 16
"""What is looked at of a file before it is used."""
LEAST_IDS = 64
"""Ids from which a dtype can be told."""
_LARGEST_VOCABULARY = 1 << 20
"""No tokenizer has more ids."""
_NUMPY = b"\x93NUMPY"
_FOREIGN = (
    (b"PAR1", "is a parquet file: tokenise it with `data prepare`"),
    (b"\x28\xb5\x2f\xfd", "is zstd data: decompress it"),
    ((20240520).to_bytes(4, "little"), "has a header of llm.c: write the ids after its first 1024 bytes to a file"),
    (b"MMIDIDX", "is an index of Megatron: give the .bin file beside it"),
    (b"version https://git-lfs.github.com/spec/", "is a pointer of Git LFS, not the data: run `git lfs pull`"),
)


class Flags(NamedTuple):
    """What messages call the flags that say how files are read."""

    dtype: str = "--data.token-dtype"
    header: str = "--data.token-header"


RUN_FLAGS = Flags()
COMMAND_FLAGS = Flags("--dtype", "--header")
"""Of `data inspect` and `data verify`."""


@dataclass(frozen=True)
class Layout:
    """How ids lie in a file."""

    dtype: str
    """A key of DTYPES."""
    offset: int = 0
    """Bytes before the first id."""
    declared: int | None = None
    """Ids that the file's own header says; None without one."""
    flags: Flags = RUN_FLAGS

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


class TokenFile(Protocol):
    """Ids by their place in a file."""

    name: str
    """Path or URL."""
    identity: str
    """What a resume knows the file by, wherever it lies."""
    layout: Layout
    tokens: int
    is_remote: bool

    def read(self, start: int, count: int) -> np.ndarray:
        """ids [count] of the file's dtype. Raises UserError where the file ends before or cannot be read."""
        ...

    def ahead(self, start: int, count: int) -> None:
        """Says that `read` will be asked for these tokens soon."""
        ...

    def content(self, start: int, count: int) -> bytes:
        """Bytes of the file, for its fingerprint."""
        ...

    @property
    def size(self) -> int:
        """Bytes of the file."""
        ...


class OpenFiles:
    """Descriptors of the files that were read last: a corpus may have more files than a process may open."""

    def __init__(self, most: int = 128) -> None:
        self._most = most
        self._open: OrderedDict[Path, IO[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, start: int, count: int) -> bytes:
        """`count` bytes from byte `start` on, fewer where the file ends. Raises OSError."""
        with self._lock:
            file = self._open.pop(path, None)
            self._open[path] = file = path.open("rb", buffering=0) if file is None else file
            if len(self._open) > self._most:
                self._open.popitem(last=False)[1].close()
            return os.pread(file.fileno(), count, start)


class LocalTokenFile:
    """A file on this machine. It is read by position, not mapped: a mapped file that is cut short, or whose disk fails,
    ends the process by a bus error."""

    is_remote = False

    def __init__(self, path: Path, identity: str, layout: Layout, files: OpenFiles | None = None) -> None:
        """`files` may be shared with others. Raises UserError when the size does not fit the dtype."""
        self.name, self.path, self.identity, self.layout = str(path), path, identity, layout
        self._files = files or OpenFiles()
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise unreadable(path, error) from error
        self.tokens = count_tokens(self.name, self.size, layout)

    def read(self, start: int, count: int) -> np.ndarray:
        assert 0 <= start <= start + count <= self.tokens, (self.name, start, count)
        size = self.layout.itemsize
        found = self.content(self.layout.offset + start * size, count * size)
        return np.frombuffer(found, DTYPES[self.layout.dtype])

    def ahead(self, start: int, count: int) -> None:
        pass  # the system reads ahead itself

    def content(self, start: int, count: int) -> bytes:
        try:
            found = self._files.read(self.path, start, count)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if len(found) < count:
            raise UserError(f"{self.name} has been cut short while it was read: restore it, and start again")
        return found


def count_tokens(name: str, size: int, layout: Layout) -> int:
    """Ids in a file of `size` bytes. Raises UserError when that is no whole number."""
    whole, rest = divmod(size - layout.offset, layout.itemsize)
    if rest or whole < 0:
        other = "uint32" if layout.dtype == "uint16" else "uint16"
        raise UserError(
            f"{name}: {size - layout.offset} bytes of ids are no whole number of {layout.dtype}: the file is cut short,"
            f" or give {layout.flags.dtype} {other}"
        )
    if layout.declared is not None and layout.declared != whole:
        raise UserError(
            f"{name} holds {whole:,} ids, and {layout.declared:,} by its NumPy header: it is cut short or changed:"
            " write it again"
        )
    return whole


def layout_of(name: str, head: bytes, dtype: str, *, header: bool, flags: Flags = RUN_FLAGS) -> Layout:
    """The layout of a file that begins with `head`, and holds `dtype` unless its `header` says. Raises UserError for
    one that begins as no token file does."""
    if head.startswith(_NUMPY):
        if not header:
            raise UserError(
                f"{name} has a NumPy header, which would be read as ids: give {flags.header}, or write the ids"
                f" alone with numpy.load({Path(name).name!r}).tofile(FILE)"
            )
        return _layout_of_array(name, head, flags)
    if header:
        raise UserError(f"{name} has no NumPy header, but {flags.header} says so: leave that flag out")
    for mark, what in _FOREIGN:
        if head.startswith(mark):
            raise UserError(f"{name} {what}")
    return Layout(dtype, flags=flags)


def _layout_of_array(name: str, head: bytes, flags: Flags) -> Layout:
    """What NumPy's header says."""
    import io
    import tokenize

    from numpy.lib import format as npy

    stream = io.BytesIO(head)
    try:
        version = npy.read_magic(stream)
        # The third is the second with names of fields beyond Latin-1, which ids have not.
        second = npy.read_array_header_2_0
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): second, (3, 0): second}.get(version)
        if read is None:
            raise ValueError(f"version {version[0]}.{version[1]}")
        shape, _, dtype = read(stream)
    # NumPy parses what stands there as Python.
    except (
        ValueError, SyntaxError, TypeError, LookupError, OverflowError, tokenize.TokenError, RecursionError, MemoryError
    ) as error:  # fmt: skip
        raise UserError(f"{name} has a damaged NumPy header ({brief(error)}): write the file again") from error
    found = next((key for key, value in DTYPES.items() if value == dtype), None)
    if found is None or len(shape) != 1:
        raise UserError(
            f"{name} holds an array of {dtype.str} of shape {shape}: write one dimension of uint16 or uint32,"
            " little-endian"
        )
    return Layout(found, stream.tell(), shape[0], flags)


def check_head(name: str, head: bytes, layout: Layout, vocab_size: int) -> None:
    """Raises UserError when the first ids of a file cannot be of its dtype and vocabulary."""
    count = (len(head) - layout.offset) // layout.itemsize
    ids = np.frombuffer(head, DTYPES[layout.dtype], max(count, 0), layout.offset)
    wrong = other_dtype(ids, vocab_size)
    if wrong is not None:
        what, dtype = wrong
        fix = f"give {layout.flags.dtype} {dtype}" if dtype in DTYPES else "write uint32"
        raise UserError(f"{name} {what}: {fix}")
    check_ids(name, 0, ids, vocab_size, layout.flags)


def other_dtype(ids: np.ndarray, vocab_size: int | None) -> tuple[str, str] | None:
    """What shows that `ids` [n], which begin a file, are of another dtype than they are read as, and that dtype:
    uint16, uint32 or int64; None where nothing does. `vocab_size`: None where it is not known."""
    if len(ids) < LEAST_IDS:
        return None
    most = _LARGEST_VOCABULARY if vocab_size is None else vocab_size
    halves = ids[: len(ids) // 2 * 2] if ids.itemsize == 2 else np.ascontiguousarray(ids).view(DTYPES["uint16"])
    if ids.itemsize == 2:
        low, high = halves[::2], halves[1::2]
        largest = (most - 1) >> 16
        # Those of ids in a small vocabulary are all 0, of others 0 and 1: as every second id of a text they are not.
        if high.max() > largest or not (low > largest).any():
            return None
        if _is_int64(low, high):
            return "is read as uint16 and looks like int64 (of every four ids three are 0 or tiny)", "int64"
        return (
            f"is read as uint16 and looks like uint32 (every second id is {'0' if not largest else 'tiny'})",
            "uint32",
        )
    if _is_int64(ids):
        return "is read as uint32 and looks like int64 (every second id is 0)", "int64"
    if (ids >= most).mean() > 0.5 and (vocab_size is None or halves.max() < vocab_size):
        return "is read as uint32 and looks like uint16", "uint16"
    return None


def _is_int64(*halves: np.ndarray) -> bool:
    """Whether numbers of 4 bytes, of which each of `halves` [n] has a part, are ids of 8 bytes: every second is 0 and
    most of the others are not."""
    one, other = (np.any([half[first::2] for half in halves], axis=0) for first in (0, 1))
    return bool(one.mean() > 0.5 and not other.any())


def check_ids(name: str, start: int, ids: np.ndarray, vocab_size: int, flags: Flags = RUN_FLAGS) -> None:
    """Raises UserError for the first of `ids` [n], which begin at token `start`, that no vocabulary row is for."""
    if len(ids) and ids.max() >= vocab_size:
        first = int(np.argmax(ids >= vocab_size))
        raise UserError(
            f"{name}: token {start + first} is id {int(ids[first])}, beyond the model's vocabulary of {vocab_size}:"
            f" give files of the tokenizer that the model was made for, or another {flags.dtype}"
        )
