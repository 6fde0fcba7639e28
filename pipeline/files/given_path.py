"""Paths as users give them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """With the folder that `~` or `~NAME` stands for; as it is where there is no such user."""
    return Path(os.path.expanduser(path))


def is_path(name: str) -> bool:
    """Whether a name can only mean a path, also where nothing is: no name of the Hugging Face hub, [OWNER/]NAME or
    [OWNER/]NAME@REVISION, looks so."""
    return name.startswith((".", "/", "~")) or name.partition("@")[0].count("/") > 1


def is_gguf(name: str) -> bool:
    """Whether a name is that of a GGUF file."""
    return name.lower().endswith(".gguf")
