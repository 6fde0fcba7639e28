"""A folder that holds a memory alone: its weights, and the name and hash of the base that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files.json_file import read_json
from pipeline.files.output import write_json
from pipeline.parallel.weight_files import StoredTensor, file_tensors

WEIGHTS, SETTINGS = "memory.safetensors", "memory.json"
VERSION = 1
FIX = "give a folder as `mnemos export --memory-only` writes it"


@dataclass(frozen=True)
class MemoryAlone:
    """A memory without its base."""

    system: str
    settings: Mapping[str, Any]
    """What decides, with the weights, what the memory computes: sections of a model's config as plain values."""
    base: Mapping[str, Any]
    """`name` and `revision` as flags have them, None for random weights, and `sha256` of its weights."""
    names: frozenset[str]
    """Parameters of the memory in the model."""
    flags: str = ""
    """Of a run whose model has such a memory."""


def write_memory(folder: Path, memory: MemoryAlone, weights: Mapping[str, Tensor]) -> None:
    """Writes the files of a memory into a folder. Raises OSError, or SafetensorError."""
    plain = {
        "version": VERSION,
        "system": memory.system,
        "settings": memory.settings,
        "base": memory.base,
    }
    save_file(
        {name: value.detach().contiguous() for name, value in weights.items()}, folder / WEIGHTS, {"format": "pt"}
    )
    write_json(folder / SETTINGS, plain)


def read_memory(folder: Path) -> tuple[MemoryAlone, dict[str, StoredTensor]]:
    """The memory in a folder, and its tensors by name. Raises UserError."""
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder}: holds no {SETTINGS}: {FIX}")
    content = read_json(folder / SETTINGS, FIX)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise UserError(f"{folder / SETTINGS}: not that of a memory of this version: {FIX}")
    base, settings = content.get("base"), content.get("settings")
    if not isinstance(base, dict) or not isinstance(base.get("sha256"), str) or not isinstance(settings, dict):
        raise UserError(f"{folder / SETTINGS}: names no base, or no settings: {FIX}")
    stored = file_tensors(folder / WEIGHTS)
    return MemoryAlone(str(content.get("system")), settings, base, frozenset(stored)), stored


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they are read back."""
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found
