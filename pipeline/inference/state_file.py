"""Files of texts that a model has read: read once, gone on from many times."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import UserError, brief, out_of_space, shown
from pipeline.files.given_path import expanded
from pipeline.inference.identity import model_hash
from pipeline.inference.incremental_text import BEFORE
from pipeline.inference.texts import Texts, decoder_of

FORMAT, VERSION = "mnemos texts", "1"
OWN = ("logits", "last")
STATE = "state."
"""What stands before the names of the decoder's own tensors."""
READ_AGAIN = "read the text again with --save-state"


def save_state(model: nn.Module, texts: Texts, path: str | Path) -> None:
    """Writes a safetensors file of `texts`, which names the model by its hash; whole or not at all. Raises UserError
    where `check_writable` does."""
    # Of a link, what it names is replaced.
    target = expanded(path).resolve()
    check_writable(target)
    own = {"logits": texts.logits, "last": texts.last}
    tensors = {**own, **{f"{STATE}{name}": tensor for name, tensor in texts.state.tensors().items()}}
    partial = _partial(target)
    try:
        # Copies, each by itself: some are parts of larger ones, which the file is not to hold.
        dense = {"memory_format": torch.contiguous_format}
        plain = {name: tensor.detach().cpu().clone(**dense) for name, tensor in tensors.items()}
        facts = {"format": FORMAT, "version": VERSION, "model": model_hash(model), "content": _hash(plain)}
        _write(partial, plain, facts)
        os.replace(partial, target)
    except OSError as error:
        fix = "make room there" if out_of_space(error) else "make it writable, or name another file"
        raise UserError(f"{target}: not written ({error.strerror or brief(error)}): {fix}") from error
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def _write(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Raises OSError."""
    # Before the library opens it, whose errors are its own.
    with path.open("wb"):
        pass
    try:
        save_file(tensors, path, facts)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: Path) -> None:
    """Raises UserError for a place without a folder, and for a file that is no state file, which would be lost."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}: make it, or name another file")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    if path.exists() and _facts(path).get("format") != FORMAT:
        raise UserError(f"{path} is there already and is no state file: name another file")
    partial = _partial(path)
    try:
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or brief(error)}): make the folder writable, or name another"
            " file"
        ) from error


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes, kinds and values of tensors on the CPU; 32 hex digits (xxh128)."""
    state = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def load_state(model: nn.Module, path: str | Path) -> Texts:
    """The texts in a file that `save_state` wrote with this very model. Raises UserError."""
    source = expanded(path)
    check_readable(source)
    facts = _facts(source)
    if facts.get("model") != model_hash(model):
        raise UserError(
            f"{source} is the state of another model, or of this one with other weights or in another precision: give"
            f" its model, or {READ_AGAIN}"
        )
    decoder = decoder_of(model)
    tensors = _read(source)
    if facts.get("content") != _hash(tensors):
        raise UserError(f"{source}: content differs from its hash: it is damaged: {READ_AGAIN}")
    try:
        state = decoder.restore(
            {name.removeprefix(STATE): value for name, value in tensors.items() if name.startswith(STATE)}
        )
        _check_own(tensors, state.rows, decoder.vocab_size)
    except ValueError as error:
        raise UserError(f"{source}: {brief(error)}: it is damaged, or of another version: {READ_AGAIN}") from None
    device = next(model.parameters()).device
    return Texts(state, tensors["logits"].to(device), tensors["last"])


def check_readable(path: Path) -> None:
    """Raises UserError for what is no state file of this version."""
    if not path.is_file():
        raise UserError(f"{path}: no such file: {READ_AGAIN}")
    facts = _facts(path)
    if facts.get("format") != FORMAT:
        raise UserError(f"{path} is no state file: give one that --save-state wrote")
    if facts.get("version") != VERSION:
        raise UserError(
            f"{path} is a state file of version {shown(facts.get('version'))}, here they are of {VERSION}: {READ_AGAIN}"
        )


def _check_own(tensors: Mapping[str, Tensor], rows: int, vocabulary: int) -> None:
    """Raises ValueError."""
    shapes = {"logits": (rows, vocabulary), "last": (rows, BEFORE)}
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{name} is missing")
        if tensors[name].shape != shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, not {shape}")
    if tensors["last"].dtype != torch.int64 or not tensors["logits"].is_floating_point():
        raise ValueError("logits and last are of other kinds")


def _facts(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing of any other file."""
    try:
        with safe_open(path, framework="pt") as handle:
            return dict(handle.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({brief(error)}): {READ_AGAIN}") from None
