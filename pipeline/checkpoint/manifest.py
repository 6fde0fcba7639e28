"""The manifest: what a complete checkpoint holds, with sizes and hashes. Its presence makes a checkpoint complete."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import xxhash

from pipeline.checkpoint.files import Entry, hash_of, sync_folder
from pipeline.errors import UserError
from pipeline.files.json_file import is_inside, parse_json
from pipeline.files.output import write_json

MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
POINTERS = (LATEST, BEST)
"""Files beside the checkpoints that hold the name of one."""
COUNTS = ("step", "world", "data", "sequence", "zero_stage", "global_batch")
CHECKSUM = "xxh128"
"""Where the manifest has the hash of the rest of itself."""
RESTORE = "restore the file, or resume from another checkpoint with --resume PATH"
"""What to do about a file that is missing or differs."""


def write_manifest(folder: Path, facts: dict[str, Any], files: Mapping[str, Entry]) -> None:
    """Lists `files`, which is what the ranks say they wrote, by name; written last and synced.

    Raises UserError when a file that another rank wrote is not seen from here.
    """
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            raise UserError(
                f"{path}: another rank wrote it and rank 0 does not see it: --output-dir must be on a file system that"
                " all nodes share"
            )
    for inner in {(folder / name).parent for name in files} | {folder}:
        sync_folder(inner)
    # Later than any before it, whatever the clocks of the machines say that a run moves between.
    before = max((_written(path) for path in complete_checkpoints(folder.parent)), default=0)
    written = max(time.time_ns(), before + 1)
    content = {**facts, "written": written, "files": dict(sorted(files.items()))}
    write_json(folder / MANIFEST, with_checksum(content))
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete checkpoint; None when there is none. Raises UserError when a bit of it differs."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        content = None
    if not isinstance(content, dict) or content != with_checksum(content) or not _is_manifest(content):
        raise UserError(f"{path}: damaged")
    return {key: value for key, value in content.items() if key != CHECKSUM}


def manifest_with(checkpoint: Path, *facts: str) -> dict[str, Any]:
    """The manifest of a checkpoint, which says all of `facts`. Raises UserError."""
    manifest = read_manifest(checkpoint) or {}
    missing = next((fact for fact in facts if fact not in manifest), None)
    if missing is not None:
        raise UserError(
            f"{checkpoint / MANIFEST}: says nothing of {missing!r}: it is of another version of this program; take the"
            " weights alone with --init-from"
        )
    return manifest


def _is_manifest(content: Mapping[str, Any]) -> bool:
    """Whether it lists files of its folder, and counts with whole numbers. Its hash only says that nobody changed it:
    what somebody else wrote must not name files elsewhere, which a conversion would write."""
    files = content.get("files")
    return (
        isinstance(files, dict)
        and all(is_inside(name) and _is_entry(entry) for name, entry in files.items())
        and all(_is_count(content.get(key, 0)) for key in ("written", *COUNTS))
    )


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and _is_count(entry.get("size")) and isinstance(entry.get(CHECKSUM), str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def unlisted(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Files in a checkpoint that its manifest says nothing of, by their place in it; hidden ones apart."""
    listed = {MANIFEST, *manifest["files"]}
    held = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in held if path.as_posix() not in listed and not path.name.startswith(".")]


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a manifest with its hash."""
    # As it is read back.
    plain = json.loads(json.dumps({key: value for key, value in content.items() if key != CHECKSUM}))
    return {**plain, CHECKSUM: xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True).encode())}


def problems(
    folder: Path, *, hashes: bool, part: tuple[int, int] = (0, 1), only: Collection[str] | None = None
) -> list[str]:
    """What is wrong with a checkpoint, a line each; empty when it is whole. `hashes` reads every byte.

    `part` (i, n) looks at every n-th file from the i-th on, largest files first, for n that share the work; `only` at
    the files of these names.
    """
    if not folder.is_dir():
        return [f"{folder}: no such folder"]
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    if manifest is None:
        return [f"{folder}: no {MANIFEST}: the save did not finish"]
    found = []
    files = sorted(manifest["files"].items(), key=lambda item: -item[1]["size"])
    files = [(name, facts) for name, facts in files if only is None or name in only]
    for name, facts in files[part[0] :: part[1]]:
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: missing")
        elif path.stat().st_size != facts["size"]:
            found.append(f"{path}: {path.stat().st_size} bytes instead of {facts['size']}")
        elif hashes and hash_of(path) != facts["xxh128"]:
            found.append(f"{path}: content differs from its hash")
    return found


def commit(folder: Path, final: Path, latest: Path) -> None:
    """Gives a finished folder its name, then points `latest` at it; both replaced atomically, `latest` last."""
    # First what can fail for want of room, while nothing has its name yet.
    partial = latest.with_name(f".{latest.name}.partial")
    _write_name(partial, final.name)
    replaced = _hidden(final, "replaced")
    if final.exists():
        # A run that went back to an earlier step saves this one again; an earlier crash may have left a folder aside.
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(folder, final)
    sync_folder(final.parent)
    os.replace(partial, latest)
    sync_folder(latest.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def point(path: Path, name: str) -> None:
    """Makes a file of POINTERS name a checkpoint; replaced atomically."""
    partial = path.with_name(f".{path.name}.partial")
    _write_name(partial, name)
    os.replace(partial, path)
    sync_folder(path.parent)


def pointed(path: Path) -> Path:
    """The checkpoint that a file of POINTERS names; any other path as it is. `latest.pt`, as trainers name it that save
    one file, is `latest` where no such file is there."""
    if path.suffix == ".pt" and path.stem in POINTERS and not path.exists() and path.with_suffix("").is_file():
        path = path.with_suffix("")
    if path.name not in POINTERS or not path.is_file():
        return path
    name = path.read_text(errors="replace").strip()
    return path.with_name(name) if re.fullmatch(r"checkpoint-\d+", name) else path


def _write_name(path: Path, name: str) -> None:
    with path.open("w") as handle:
        handle.write(name + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def prune_old(
    folder: Path, keep: int, saved: int, every: int = 0, *, start: bool = False, ends: Collection[int] = ()
) -> list[Path]:
    """Takes their names from complete checkpoints up to step `saved` beyond the `keep` newest; returns what may be
    removed. A run that went back to an earlier step leaves later ones alone until it saves them anew. Multiples of
    `every` keep their names (0: none does for that), and with `start` that of step 0; so do those of the steps `ends`,
    at which phases ended, and the one that `best` names. None of these counts as one of the `keep`.

    What is half removed is never taken for a checkpoint, and removing, which takes time, can wait.
    """
    ours = [path for path in complete_checkpoints(folder) if step_of(path) <= saved]
    pruned, best = [], pointed(folder / BEST)
    for old in ours[:-keep]:
        step = step_of(old)
        if (every and step % every == 0) or (start and step == 0) or step in ends or old == best:
            continue
        hidden = _hidden(old, "removed")
        os.replace(old, hidden)
        pruned.append(hidden)
    return pruned


def recover(folder: Path) -> None:
    """Gives a checkpoint that was set aside for another of its step, which never came, its name back."""
    for path in folder.glob(".checkpoint-*.replaced"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if not final.exists():
            os.replace(path, final)


def clear_leftovers(folder: Path) -> None:
    """Removes what saves that were cut off left in a `checkpoints` folder; for where no other save is under way."""
    recover(folder)
    for path in folder.glob(".checkpoint-*"):
        if path.suffix in (".partial", ".removed", ".replaced", ".universal"):
            shutil.rmtree(path)


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a `checkpoints` folder, oldest step first."""
    return [path for path in named_checkpoints(folder) if (path / MANIFEST).is_file()]


def named_checkpoints(folder: Path) -> list[Path]:
    """Folders with the name of a checkpoint, whole or damaged, lowest step first."""
    # A folder gets this name when it is complete: one without a manifest is damaged.
    named = (path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(named, key=step_of)


def _written(path: Path) -> int:
    try:
        manifest = read_manifest(path)
    except UserError:
        manifest = None
    # The files of a folder without a manifest that can be read were written, too.
    return path.stat().st_mtime_ns if manifest is None else int(manifest["written"])


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.rpartition("-")[2])


def newest(
    folder: Path,
    other: str = "go on from {name} with --resume {path}",
    none: str = "use another --output-dir",
) -> Path | None:
    """The checkpoint that was written last; None when there is none. `other`, `none`: what to do where it is damaged,
    when another one is whole and when none is.

    Raises UserError when it is damaged (by sizes): to go on from an older one would, in time, write over it, and to
    start afresh would hide the loss.
    """
    # The last one written is not always the highest step: a run may have gone back to an earlier one.
    candidates = sorted(named_checkpoints(folder), key=lambda path: (_written(path), step_of(path)))
    if not candidates:
        return None
    last = candidates[-1]
    wrong = problems(last, hashes=False)
    if not wrong:
        return last
    whole = [path for path in candidates if not problems(path, hashes=False)]
    fix = other.format(name=whole[-1].name, path=whole[-1]) if whole else none
    raise UserError(f"{wrong[0]}: restore the file, or {fix}")
