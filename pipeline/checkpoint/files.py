"""Files of a checkpoint: synced, hashed as they are written; and tensors moved out of the way of training first."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

BLOCK = 2**22
"""Bytes that are hashed at a time."""

Entry = dict[str, Any]
"""{"size": bytes, "sha256": hex digest} of a file."""
Jobs = dict[str, Callable[[Path], Entry]]
"""By name of a file in the checkpoint: what writes it at a path, synced."""


def shard(content: Any) -> Callable[[Path], Entry]:
    """A job that writes `content` as torch.save does."""
    return lambda path: _write(path, lambda out: torch.save(content, out))  # type: ignore[arg-type]


def tensors(content: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Callable[[Path], Entry]:
    """A job that writes a safetensors file."""
    return lambda path: _write(path, lambda out: out.write(save(content, metadata)))


def _write(path: Path, write: Callable[[_Hashed], Any]) -> Entry:
    with path.open("wb") as handle, ThreadPoolExecutor(1) as pool:
        out = _Hashed(handle, pool)
        write(out)
        handle.flush()
        os.fsync(handle.fileno())
        return {"size": handle.tell(), "sha256": out.digest.hexdigest()}


class _Hashed:
    """A file that is hashed on the way, at the same time: to read it again would cost as much again."""

    def __init__(self, handle: BinaryIO, pool: ThreadPoolExecutor) -> None:
        self.handle, self.pool, self.digest = handle, pool, hashlib.sha256()

    def write(self, data: Any) -> int:
        if len(data) < BLOCK:
            self.digest.update(data)
            return self.handle.write(data)
        hashed = self.pool.submit(self.digest.update, data)
        written = self.handle.write(data)
        hashed.result()
        return written

    def flush(self) -> None:
        self.handle.flush()


def small(write: Callable[[Path], None]) -> Callable[[Path], Entry]:
    """A job of a function that writes a file by itself; it is read back for its hash."""

    def write_and_seal(path: Path) -> Entry:
        write(path)
        return seal(path)

    return write_and_seal


def seal(path: Path) -> Entry:
    """Syncs a file that was written and hashes it."""
    with path.open("rb") as handle:
        digest = digest_of(handle)
        os.fsync(handle.fileno())
        return {"size": handle.tell(), "sha256": digest}


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as handle:
        return digest_of(handle)


def digest_of(handle: BinaryIO) -> str:
    """Hex digest of what is left of an open file."""
    digest = hashlib.sha256()
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

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._kept.values())


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(tensor_bytes, value))
    return 0
