"""Which tensors the safetensors files of a model hold, and where: headers alone are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import UserError, brief, shown
from pipeline.files.json_file import is_inside, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
REMEDY = "copy or download the folder again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; `dtype` as safetensors spells it (F32, BF16, I8)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    value: Tensor | None = None
    """Of a file that is no safetensors file: the tensor itself."""

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU; `name` is its own in the file. Raises UserError."""
        if self.value is not None:
            return self.value
        with open_safetensors(self.file) as handle:
            return handle.get_tensor(name)


def open_safetensors(path: Path) -> Any:
    """`safe_open`, on the CPU; a UserError names a file that cannot be read, or that is cut short."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({brief(error)}): copy or save it again") from None


def file_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name. Raises UserError."""
    if not path.is_file():
        gone = " (it is a link to a file that is gone)" if path.is_symlink() else ""
        raise UserError(f"{path}: no such file{gone}: {REMEDY}")
    with open_safetensors(path) as handle:
        names: list[str] = handle.keys()
        slices = {name: handle.get_slice(name) for name in names}
        return {name: StoredTensor(path, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def index_files(folder: Path) -> dict[str, str]:
    """What the index of a folder says: the file's name of every tensor. Raises UserError."""
    path = folder / INDEX
    content = read_json(path, REMEDY)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path}: has no `weight_map` of tensors and files: {REMEDY}")
    for tensor, name in names.items():
        if not is_inside(name):
            raise UserError(
                f"{path}: {shown(tensor)} is said to be in {shown(name)}, which is no file of the folder: {REMEDY}"
            )
    return names


def model_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the model in a folder as `save_pretrained` writes it, by name.

    They are in the files that model.safetensors.index.json names, or without an index in model.safetensors. Whatever
    else lies there (an older save, an adapter) is not looked at. Raises UserError for a file that is missing, cut short
    or lacks what the index says it holds, and for a tensor that is in two of the files.
    """
    if not os.path.lexists(folder / INDEX):  # a link to a file that is gone says which one
        if not os.path.lexists(folder / SINGLE):
            raise UserError(f"{folder}: holds neither {INDEX} nor {SINGLE}{_others(folder)}")
        return file_tensors(folder / SINGLE)
    index = index_files(folder)
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(index.values())):
        path = folder / name
        if not path.is_file():
            fix = f"{REMEDY}, or remove the index if {SINGLE} is the model" if (folder / SINGLE).exists() else REMEDY
            raise UserError(f"{folder / INDEX}: names {name}, which is not there: {fix}")
        tensors = file_tensors(path)
        twice = next((tensor for tensor in tensors if tensor in found), None)
        if twice is not None:
            raise UserError(
                f"{folder / INDEX}: {shown(twice)} is in two of the files it names, {found[twice].file.name} and"
                f" {name}: {REMEDY}"
            )
        found.update(tensors)
    return {tensor: _as_indexed(folder, tensor, name, found) for tensor, name in index.items()}


def _as_indexed(folder: Path, tensor: str, name: str, found: Mapping[str, StoredTensor]) -> StoredTensor:
    stored = found.get(tensor)
    if stored is None or stored.file != folder / name:
        where = "" if stored is None else f" (it is in {stored.file.name})"
        raise UserError(f"{folder / INDEX}: says that {shown(tensor)} is in {name}, which lacks it{where}: {REMEDY}")
    return stored


def _others(folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if not others:
        return ": give a folder as save_pretrained writes it"
    return f" (but {others[0]}, which no index says to be the model's): restore the index, or name the model's folder"
