"""Token states of frozen blocks: computed once, kept in a file, and read from it in every epoch."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import UserError, brief
from pipeline.systems.cvfp.data.cache import make_folder, not_writable

KEY = "key"
VERSION = 1
"""Of how states are computed and stored: files of another one are not read."""


def frozen_path(folder: Path, name: str, key: Mapping[str, Any]) -> Path:
    """The file of the states that `key` (JSON-ready) decides: weights, data, and the rows of this rank."""
    digest = blake2b(_text(key).encode(), digest_size=8).hexdigest()
    return folder / f"frozen_{name}_{digest}.safetensors"


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


class FrozenStates:
    """The states of the labelled tokens of each micro-batch of a pass, from a file; they are read when they are asked
    for, so that the pages of a file that is larger than the memory come and go."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        """Raises UserError for a file that is damaged, or of other weights or data than `key` says."""
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            facts = self._file.metadata() or {}
            self._names = set(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: is no file of token states ({brief(error, 80)}): remove it") from error
        if facts.get(KEY) != _text(key):
            raise UserError(f"{path}: holds the token states of other weights or other data: remove it")

    def states(self, slot: int, stream: int) -> Tensor:
        """[tokens, D] on the CPU, of the micro-batch in a slot whose first row is `stream`."""
        # A copy, as the place in the file decides how it is aligned, and so the last bit of what is computed of it.
        return self._file.get_tensor(_name(slot, stream)).clone()


def _name(slot: int, stream: int) -> str:
    return f"{slot}.{stream}"


class UnwrittenStates:
    """Those of a dry run, in memory."""

    def __init__(self, path: Path, found: Mapping[str, Tensor]) -> None:
        self.path, self._found = path, found

    def states(self, slot: int, stream: int) -> Tensor:
        """As `FrozenStates.states`."""
        return self._found[_name(slot, stream)]


class FrozenWriter:
    """Collects the states of a pass in memory, since a file of safetensors begins with the sizes of all its tensors,
    and writes them whole or not at all."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path, self.key = path, key
        self._found: dict[str, Tensor] = {}

    def add(self, slot: int, stream: int, states: Tensor) -> None:
        """Of one micro-batch [tokens, D]."""
        self._found[_name(slot, stream)] = states.cpu().contiguous()

    def unwritten(self) -> UnwrittenStates:
        return UnwrittenStates(self.path, self._found)

    def write(self) -> int:
        """Its bytes. Raises UserError where the folder cannot be written."""
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        make_folder(self.path.parent)
        try:
            save_file(self._found, partial, {KEY: _text(self.key)})
            os.replace(partial, self.path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise not_writable(self.path.parent, error) from error
        return sum(tensor.nbytes for tensor in self._found.values())
