"""Tokenised documents on disk, by name and by what made them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline.errors import UserError
from pipeline.systems.cvfp.documents import DocumentSet


def _path(folder: Path, name: str, fingerprint: str) -> Path:
    return folder / f"{name}_{fingerprint[:12]}.safetensors"


def read_cache(folder: Path, name: str, fingerprint: str) -> DocumentSet | None:
    """The documents of that fingerprint; None where they are not there. Raises UserError for a damaged file."""
    path = _path(folder, name, fingerprint)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as handle:
            facts = handle.metadata() or {}
            if facts.get("fingerprint") != fingerprint:
                raise UserError(f"{path}: of other data than its name says: remove it")
            return DocumentSet(
                handle.get_tensor("tokens"), handle.get_tensor("ends"), int(facts["training"]), int(facts["vocab"]),
                name, fingerprint,
            )  # fmt: skip
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a cache of tokenised documents: remove it") from error


def write_cache(folder: Path, documents: DocumentSet) -> None:
    """Writes it whole or not at all. Raises UserError where the folder cannot be written."""
    path = _path(folder, documents.name, documents.fingerprint)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    facts = {
        "fingerprint": documents.fingerprint, "training": str(documents.training), "vocab": str(documents.vocab),
    }  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"tokens": documents.tokens, "ends": documents.ends}
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, partial, facts)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"--model.data-cache {folder}: cannot be written ({error}): name another folder") from error
