"""The manifest: what a complete checkpoint holds, with sizes and hashes. Its presence makes a checkpoint complete."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.run import write_json

MANIFEST = "manifest.json"
LATEST = "latest"


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(handle)


def _digest(handle: Any) -> str:
    digest = hashlib.sha256()
    while block := handle.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Lists every file of `folder` with size and hash; written last and synced."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {**facts, "written": time.time_ns(), "files": files})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete checkpoint; None when there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError:  # not JSON, or not text
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise UserError(f"{path}: damaged")
    return content


def problems(folder: Path, *, hashes: bool) -> list[str]:
    """What is wrong with a checkpoint, a line each; empty when it is whole. `hashes` reads every byte."""
    if not folder.is_dir():
        return [f"{folder}: no such folder"]
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    if manifest is None:
        return [f"{folder}: no {MANIFEST}: the save did not finish"]
    found = []
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: missing")
        elif path.stat().st_size != facts["size"]:
            found.append(f"{path}: {path.stat().st_size} bytes instead of {facts['size']}")
        elif hashes and sha256(path) != facts["sha256"]:
            found.append(f"{path}: content differs from its hash")
    return found


def commit(folder: Path, final: Path, latest: Path) -> None:
    """Gives a finished folder its name, then points `latest` at it; both replaced atomically, `latest` last."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        # A run that went back to an earlier step saves this one again; an earlier crash may have left a folder aside.
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(folder, final)
    _sync(final.parent)
    partial = latest.with_name(f".{latest.name}.partial")
    with partial.open("w") as handle:
        handle.write(final.name + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, latest)
    _sync(latest.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_old(folder: Path, keep: int, saved: int) -> None:
    """Removes complete checkpoints up to step `saved` beyond the `keep` newest; a run that went back to an earlier step
    leaves later ones alone until it saves them anew. The manifest goes first, so that what is half removed is never
    taken for complete."""
    ours = [path for path in complete_checkpoints(folder) if _step(path) <= saved]
    for old in ours[:-keep]:
        (old / MANIFEST).unlink()
        shutil.rmtree(old)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a `checkpoints` folder, oldest step first."""
    return [path for path in _named(folder) if (path / MANIFEST).is_file()]


def _named(folder: Path) -> list[Path]:
    # A folder gets this name when it is complete: one without a manifest is damaged.
    named = (path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(named, key=_step)


def _written(path: Path) -> int:
    try:
        return int((read_manifest(path) or {}).get("written", 0))
    except UserError:
        return 0


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def newest(folder: Path) -> Path | None:
    """The undamaged (by sizes) checkpoint that was written last; None when there is none.

    Raises UserError when checkpoints exist and all are damaged: starting afresh would hide the loss.
    """
    # The last one written is not always the highest step: a run may have gone back to an earlier one.
    candidates = sorted(_named(folder), key=lambda path: (_written(path), _step(path)))
    reasons = []
    for path in reversed(candidates):
        wrong = problems(path, hashes=False)
        if not wrong:
            return path
        reasons += wrong
    if reasons:
        raise UserError(
            f"{reasons[0]}: no whole checkpoint is left in {folder}: restore the file, or use another --output-dir"
        )
    return None
