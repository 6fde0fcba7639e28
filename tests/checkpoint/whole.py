"""A manifest over whatever is in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoint.files import seal
from pipeline.checkpoint.manifest import MANIFEST, write_manifest


def write_whole(folder: Path, facts: dict[str, Any]) -> None:
    """Makes a folder a complete checkpoint with these facts."""
    present = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)
    write_manifest(folder, facts, {str(path.relative_to(folder)): seal(path) for path in present})
