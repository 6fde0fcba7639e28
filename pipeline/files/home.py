"""Paths that begin with a user's home."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """With the folder that `~` or `~NAME` stands for; as it is where there is no such user."""
    return Path(os.path.expanduser(path))
