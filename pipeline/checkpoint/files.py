"""Files of a checkpoint: synced, hashed as they are written; and tensors moved out of the way of training first."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import UserError

BLOCK = 2**22
"""Bytes that are hashed at a time."""

Entry = dict[str, Any]
"""{"size": bytes, "xxh128": hex digest} of a file. XXH3 finds damage at the speed of memory; SHA-256 would take as long
as the writing, and neither keeps out somebody who may write the manifest too."""


def write_shard(content: Any, path: Path) -> Entry:
    """Writes `content` as torch.save does."""
    with path.open("wb") as handle:
        out = _Hashed(handle)
        torch.save(content, out)  # type: ignore[arg-type]
        handle.flush()
        os.fsync(handle.fileno())
        return {"size": handle.tell(), "xxh128": out.digest.hexdigest()}


def write_tensors(content: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Entry:
    """Writes a safetensors file."""
    save_file(content, path, metadata)
    return checksum(path)


class _Hashed:
    """A file that is hashed on the way."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle, self.digest = handle, xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.handle.write(data)

    def flush(self) -> None:
        self.handle.flush()


def checksum(path: Path) -> Entry:
    """Syncs a file that a library wrote, and reads it back for its hash."""
    with path.open("rb") as handle:
        digest = _digest(handle)
        os.fsync(handle.fileno())
        return {"size": handle.tell(), "xxh128": digest}


def hash_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as handle:
        return _digest(handle)


def _digest(handle: BinaryIO) -> str:
    digest = xxhash.xxh3_128()
    while block := handle.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_new(folder: Path) -> None:
    """Raises UserError where a folder that is to be written exists."""
    if folder.exists():
        raise UserError(f"{folder}: exists already: name a new folder")


@contextlib.contextmanager
def new_folder(folder: Path, partial: Path | None = None) -> Iterator[Path]:
    """A folder to fill, hidden beside `folder` (or `partial`), which takes its name at the end: what fails leaves
    nothing. Raises UserError for what cannot be written."""
    partial = partial or folder.with_name(f".{folder.name.removeprefix('.')}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder}: not written ({error.strerror or error}): make room there") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class Staging:
    """Host memory that tensors are copied to while they are written; kept from save to save, because memory that was
    never touched costs more than the copy."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def copy(self, value: Any, *place: object) -> Any:
        """A copy of nested dicts, lists and tuples in which no tensor is one that training changes."""
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach(), place)
        if isinstance(value, Mapping):
            return {key: self.copy(item, *place, key) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.copy(item, *place, index) for index, item in enumerate(value))
        return copy.deepcopy(value)

    def _copy_tensor(self, value: Tensor, place: tuple[object, ...]) -> Tensor:
        kept = self._kept.get(place)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            pinned = value.is_cuda
            kept = self._kept[place] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        kept.copy_(value, non_blocking=value.is_cuda)
        return kept


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(tensor_bytes, value))
    return 0
