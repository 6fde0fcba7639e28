"""loader.json of a checkpoint, for what does not resume from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoint.manifest import RESTORE, problems, read_manifest
from pipeline.errors import UserError
from pipeline.files.json_file import read_json

LOADER_STATE = "loader.json"


def read_loader_state(checkpoint: Path) -> dict[str, Any]:
    """Where the loaders stood; {} for a checkpoint that was converted from another trainer's, which has no position in
    this data. Raises UserError when a byte of the file differs."""
    manifest = read_manifest(checkpoint)
    if manifest is None or LOADER_STATE not in manifest["files"]:
        return {}
    wrong = problems(checkpoint, hashes=True, only=(LOADER_STATE,))
    if wrong:
        raise UserError(f"{wrong[0]}: {RESTORE}")
    found = read_json(checkpoint / LOADER_STATE, RESTORE)
    if not isinstance(found, dict):
        raise UserError(f"{checkpoint / LOADER_STATE}: holds no state of a loader: {RESTORE}")
    return found


def makers_at(checkpoint: Path) -> dict[str, str]:
    """What the loader of a checkpoint knew of the tokenizers of its token files, as `makers_of`."""
    found = read_loader_state(checkpoint).get("tokenizers")
    return found if isinstance(found, dict) else {}


def dtypes_at(checkpoint: Path) -> set[str]:
    """The dtypes of the token files that a checkpoint was trained on; none where it knows of no such files."""
    source = read_loader_state(checkpoint).get("fingerprint", {}).get("source", {})
    stated = [part["dtype"] for part in source.values() if isinstance(part, dict) and "dtype" in part]
    # A source of files of both names both.
    return {dtype for joined in stated for dtype in str(joined).split(", ")}
