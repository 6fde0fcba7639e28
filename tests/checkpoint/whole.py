"""Manifests: over whatever is in a folder, and with other facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.checkpoint.files import checksum
from pipeline.checkpoint.manifest import MANIFEST, with_checksum, write_manifest


def write_whole(folder: Path, facts: dict[str, Any]) -> None:
    """Makes a folder a complete checkpoint with these facts."""
    present = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)
    write_manifest(folder, facts, {str(path.relative_to(folder)): checksum(path) for path in present})


def change_facts(folder: Path, **changes: Any) -> None:
    """A checkpoint that says other things of itself, as one that somebody else saved."""
    path = folder / MANIFEST
    path.write_text(json.dumps(with_checksum({**json.loads(path.read_text()), **changes})))
