"""Tokenised documents on disk, by name and by the settings that made them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline.errors import UserError, brief
from pipeline.systems.cvfp.documents import DocumentSet


@dataclass(frozen=True)
class Cached:
    """Documents of a file, and what their source was when they were read."""

    documents: DocumentSet
    source: Any


def cache_path(folder: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """The file of the documents that `settings` (JSON-ready) give: all that decides them but the source's content."""
    key = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=6).hexdigest()
    return folder / f"{name}_{key}.safetensors"


def fingerprint_of(tokens: np.ndarray, ends: np.ndarray, training: int, vocab: int, tokenizer: str) -> str:
    """Hash of documents by their content."""
    state = blake2b(json.dumps([training, vocab, tokenizer]).encode(), digest_size=16)
    for array, kind in ((tokens, "<u4"), (ends, "<i8")):
        state.update(np.ascontiguousarray(array, kind).data)
    return state.hexdigest()


def read_cache(path: Path, settings: Mapping[str, Any]) -> Cached | None:
    """What a file holds; None where there is none. Raises ValueError, in words, for one that is damaged, and UserError
    for one of other settings."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as handle:
            facts = handle.metadata() or {}
            tokens, ends = handle.get_tensor("tokens"), handle.get_tensor("ends")
        training, vocab, tokenizer = int(facts["training"]), int(facts["vocab"]), facts["tokenizer"]
        fingerprint = facts["fingerprint"]
        source, notes = json.loads(facts["source"]), tuple(json.loads(facts["notes"]))
        name, made = facts["name"], json.loads(facts["settings"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"is no cache of tokenised documents ({brief(error, 80)})") from error
    if made != settings:
        other = ", ".join(key for key in settings if not isinstance(made, dict) or made.get(key) != settings[key])
        raise UserError(f"{path}: documents of other data than its name says ({other}): remove it")
    if fingerprint_of(tokens, ends, training, vocab, tokenizer) != fingerprint:
        raise ValueError("does not hold what was written to it")
    return Cached(DocumentSet(tokens, ends, training, vocab, name, fingerprint, tokenizer, notes), source)


def write_cache(path: Path, documents: DocumentSet, settings: Mapping[str, Any], source: Any) -> None:
    """Writes it whole or not at all; its folder may be a link. Raises UserError where that cannot be done."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    facts = {
        "name": documents.name,
        "fingerprint": documents.fingerprint,
        "training": str(documents.training),
        "vocab": str(documents.vocab),
        "tokenizer": documents.tokenizer,
        "notes": json.dumps(documents.notes),
        "settings": json.dumps(settings),
        "source": json.dumps(source),
    }
    make_folder(path.parent)
    try:
        save_file({"tokens": documents.tokens, "ends": documents.ends}, partial, facts)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise not_writable(path.parent, error) from error


def make_folder(folder: Path) -> None:
    """Makes the cache's folder. Raises UserError."""
    if folder.is_symlink() and not folder.exists():
        target = os.path.realpath(folder)
        raise UserError(f"--model.data-cache {folder}: a link to {target}, which is not there: create it, or mount it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(folder, error) from error


def not_writable(folder: Path, error: Exception) -> UserError:
    """The one line that says so."""
    reason = getattr(error, "strerror", None) or brief(error)
    return UserError(f"--model.data-cache {folder}: cannot be written ({reason}): make it writable, or name another")
