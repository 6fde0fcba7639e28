"""Python code that comes with a Hugging Face tokenizer: found, allowed or refused, before any of it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.sources.content import hash_files
from pipeline.errors import UserError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Files of a model's folder that no tokenizer reads."""


def references(name: str, revision: str | None) -> list[str] | None:
    """The classes of its own that a tokenizer is made by; None when it needs none. Runs nothing.

    Raises whatever transformers raises for a broken folder, a wrong name or a dead network.
    """
    from transformers import PretrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    auto_map = get_tokenizer_config(name, revision=revision).get("auto_map")
    classes = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    if not classes:
        return None
    # What is allowed to run is allowed for the model's configuration too, which is read first.
    try:
        config = PretrainedConfig.get_config_dict(name, revision=revision)[0].get("auto_map") or {}
    except OSError:  # a tokenizer without a model
        config = {}
    found = [classes] if isinstance(classes, str) else list(classes)
    return [reference for reference in [*found, *config.values()] if isinstance(reference, str)]


def check(name: str, shown: str, found: Sequence[str], trusted: bool) -> None:
    """Raises UserError unless the classes `found` may run. `shown` is the name that the user gave."""
    if not trusted:
        pin = "" if Path(name).exists() else " and NAME@COMMIT"
        raise UserError(
            f"--data.tokenizer {shown} has Python code of its own, which was not run: read it and allow it with"
            f" --data.trust-remote-code{pin}, or name a tokenizer without code"
        )
    for reference in found:
        other, elsewhere, _ = reference.partition("--")
        if elsewhere and other != name:
            raise UserError(
                f"--data.tokenizer {shown} runs code of another repository, {other}, which nothing pins: save the"
                " tokenizer and that code in one folder, and name the folder"
            )


def identity(name: str, revision: str | None) -> str:
    """What stands for the code in a fingerprint: its commit, or the content of its folder but for weights."""
    folder = Path(name)
    if not folder.is_dir():
        return str(revision)
    held = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    kept = [
        path
        for path in held
        if path.suffix not in _WEIGHTS and not any(part.startswith((".", "__pycache__")) for part in path.parts)
    ]
    return hash_files([(path.as_posix(), folder / path) for path in kept])


def one_at_a_time() -> contextlib.AbstractContextManager[Any]:
    """Keeps the ranks of a machine apart: each copies the code to the same cache, and imports it from there."""
    from filelock import FileLock
    from transformers.utils.hub import HF_MODULES_CACHE

    folder = Path(HF_MODULES_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "mnemos.lock")
