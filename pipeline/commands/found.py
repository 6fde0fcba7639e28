"""The checkpoints that a path means, and what lies beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.manifest import BEST, LATEST, MANIFEST, pointed, read_manifest
from pipeline.errors import UserError

NAME = re.compile(r"checkpoint-\d+")
HIDDEN = re.compile(r"\.(checkpoint-\d+)\.(partial|replaced|removed|universal)")

LEFT = {
    "partial": "a save that did not finish, or that is being written now; the next start or save removes it",
    "replaced": "an older save of a step that was saved again; the next start or save removes it",
    "removed": "an old checkpoint that was being removed; the next start or save goes on with that",
    "universal": "a conversion for a resume that did not finish, or that goes on now; the next start removes it",
}
"""What the hidden folders beside checkpoints are."""
MENDED = {
    LATEST: "a resume takes the newest complete one, and the next save writes it anew",
    BEST: "the next start mends it",
}
"""What becomes of a file that names no checkpoint."""


@dataclass(frozen=True)
class Found:
    """The checkpoints that a path means, and what lies beside them."""

    checkpoints: list[Path]
    """Folders that are named as a checkpoint is, oldest step first, complete or not."""
    folder: Path | None
    """The `checkpoints` folder; None where a single checkpoint was named."""

    def named(self, file: str) -> str | None:
        """The name in `latest` or `best`; None without such a file."""
        path = None if self.folder is None else self.folder / file
        if path is None or not path.is_file():
            return None
        return path.read_text(errors="replace").strip()


def find(path: Path) -> Found:
    """What `path` holds. Raises UserError where it holds no checkpoint."""
    path = pointed(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder: give a checkpoint's folder or a run directory")
    hidden = HIDDEN.fullmatch(path.name)
    if hidden is not None:
        raise UserError(f"{path}: no checkpoint: {LEFT[hidden[2]]}")
    if (path / MANIFEST).is_file() or NAME.fullmatch(path.name):
        return Found([path], None)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [entry for entry in folder.iterdir() if entry.is_dir() and NAME.fullmatch(entry.name)]
    if not found and not notes(folder):
        raise UserError(f"{path}: no checkpoint there: give a checkpoint's folder or a run directory")
    return Found(sorted(found, key=lambda entry: int(entry.name.rpartition("-")[2])), folder)


def facts(checkpoint: Path) -> dict[str, Any]:
    """What the manifest says of a checkpoint, by the columns of the tables; `problem` where it cannot be read."""
    row: dict[str, Any] = {"path": str(checkpoint), "name": checkpoint.name, "problem": None}
    try:
        manifest = read_manifest(checkpoint)
    except UserError as error:
        return {**row, "problem": str(error)}
    if manifest is None:
        return {**row, "problem": f"{checkpoint}: no {MANIFEST}: the save did not finish"}
    return {
        **row,
        "step": manifest.get("step"),
        "written": manifest.get("written"),
        "bytes": sum(int(file["size"]) for file in manifest["files"].values()),
        "files": len(manifest["files"]),
        "world": manifest.get("world"),
        "data": manifest.get("data"),
        "sequence": manifest.get("sequence"),
        "zero_stage": manifest.get("zero_stage"),
        "format": manifest.get("format", "shards"),
    }


def stale_pointers(place: Found) -> list[str]:
    """A line for each of `latest` and `best` that names no complete checkpoint."""
    found = []
    for file, fix in MENDED.items():
        name = place.named(file)
        if name is None or place.folder is None:
            continue
        if not (NAME.fullmatch(name) and (place.folder / name / MANIFEST).is_file()):
            found.append(f"{place.folder / file}: names {name!r}, which is no complete checkpoint: {fix}")
    return found


def notes(folder: Path | None) -> list[str]:
    """A line for everything that a save or a resume has left behind and that is no checkpoint."""
    found = []
    for path in sorted(folder.iterdir()) if folder is not None else []:
        match = HIDDEN.fullmatch(path.name)
        if match is None:
            continue
        name, kind = match.groups()
        what = LEFT[kind]
        if kind == "replaced" and not path.with_name(name).exists():
            what = f"{name} as it was before its step was saved again, which did not finish; the next start restores it"
        found.append(f"{path}: no checkpoint: {what}")
    return found
