"""`checkpoint verify`, `checkpoint list` and `checkpoint convert`: no process group, no GPU, no model."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.manifest import LATEST, MANIFEST, newest, problems, read_manifest, unlisted
from pipeline.commands.convert import (
    CONVERT,
    FORMAT_FLAGS,
    TOKENIZER,
    check_format,
    from_native,
    to_native,
    to_universal,
)
from pipeline.commands.flags import pop_flag, wants_help
from pipeline.errors import UserError
from pipeline.host.hardware import choose_accelerator
from pipeline.spelling import did_you_mean, nearest, nearest_flag
from pipeline.units import human_bytes

USAGE = """\
usage: mnemos checkpoint verify PATH ... [--quick]
       mnemos checkpoint list PATH [--json]
       mnemos checkpoint convert CHECKPOINT DIR [--to olmo [--tokenizer NAME]]
       mnemos checkpoint convert FOLDER DIR --from olmo

A PATH is a checkpoint's folder, or a run directory for all of its checkpoints. Each command takes --help."""

VERIFY = """\
usage: mnemos checkpoint verify PATH ... [--quick]

Reads every byte of checkpoints and compares it with their manifests. A PATH is a checkpoint's folder, or a run
directory for all of its checkpoints. The exit code is 0 when all are whole, else 2.

  --quick  compare sizes alone, as a resume does when it chooses a checkpoint"""

LIST = """\
usage: mnemos checkpoint list PATH [--json]

The checkpoints of a run directory, or the one in a folder: step, time, size, ranks, ZeRO stage, format, `latest`.

  --json  as JSON"""

Flags = Mapping[str, str | None]
"""The flags that are given, with the values of those that have one."""
NAME = re.compile(r"checkpoint-\d+")
HIDDEN = re.compile(r"\.(checkpoint-\d+)\.(partial|replaced|removed|universal)")

LEFT = {
    "partial": "a save that did not finish, or that is being written now; the next start or save removes it",
    "replaced": "an older save of a step that was saved again; the next start or save removes it",
    "removed": "an old checkpoint that was being removed; the next start or save goes on with that",
    "universal": "a conversion for a resume that did not finish, or that goes on now; the next start removes it",
}
"""What the hidden folders beside checkpoints are."""


def run_checkpoint(words: Sequence[str]) -> None:
    """The command: `checkpoint verify`, `checkpoint list` or `checkpoint convert`. Raises UserError."""
    if words and wants_help(words[:1]):
        print(USAGE)
        return
    if not words or words[0] not in _COMMANDS:
        given = f"{words[0]!r}{did_you_mean(nearest(words[0], _COMMANDS))}" if words else "none"
        raise UserError(f"checkpoint needs one of {', '.join(_COMMANDS)} (got {given})")
    command, help_text, flags, valued = _COMMANDS[words[0]]
    rest = list(words[1:])
    if wants_help(rest):
        print(help_text)
        return
    values: dict[str, str | None] = {}
    for flag in valued:
        value, rest = pop_flag(rest, flag)
        if value is not None:
            values[flag] = value
    given_flags = [word for word in rest if word.startswith("-")]
    unknown = [word for word in given_flags if word not in flags]
    if unknown:
        meant = did_you_mean(nearest_flag(unknown[0], [*flags, *valued]))
        raise UserError(f"checkpoint {words[0]} has no {unknown[0]}{meant} (see mnemos checkpoint {words[0]} --help)")
    command([word for word in rest if not word.startswith("-")], {**dict.fromkeys(given_flags), **values})


@dataclass(frozen=True)
class Found:
    """The checkpoints that a path means, and what lies beside them."""

    checkpoints: list[Path]
    """Folders that are named as a checkpoint is, oldest step first, complete or not."""
    folder: Path | None
    """The `checkpoints` folder; None where a single checkpoint was named."""

    @property
    def latest(self) -> str | None:
        """The name in `latest`; None without such a file."""
        path = None if self.folder is None else self.folder / LATEST
        if path is None or not path.is_file():
            return None
        return path.read_text(errors="replace").strip()


def find(path: Path) -> Found:
    """What `path` holds. Raises UserError where it holds no checkpoint."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder: give a checkpoint's folder or a run directory")
    hidden = HIDDEN.fullmatch(path.name)
    if hidden is not None:
        raise UserError(f"{path}: no checkpoint: {LEFT[hidden[2]]}")
    if (path / MANIFEST).is_file() or NAME.fullmatch(path.name):
        return Found([path], None)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [entry for entry in folder.iterdir() if entry.is_dir() and NAME.fullmatch(entry.name)]
    if not found and not _notes(folder):
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


def _verify(words: Sequence[str], flags: Flags) -> None:
    if not words:
        raise UserError(
            "checkpoint verify needs the folder of a checkpoint or run (see mnemos checkpoint verify --help)"
        )
    places = [find(Path(word)) for word in words]
    count = sum(len(place.checkpoints) for place in places)
    wrong: list[str] = []
    damaged = 0
    print(_line("checkpoint", "step", "size", "ranks", "ZeRO", "format", "state"))
    for place in places:
        for checkpoint in place.checkpoints:
            row = facts(checkpoint)
            found = check(checkpoint, hashes="--quick" not in flags)
            if found and not checkpoint.is_dir():
                # A run that goes on removes what lies beyond --keep.
                found, state = [], "removed meanwhile"
            else:
                state = "OK" if not found else found[0]
            print(_line(*_cells(row), state), flush=True)
            for problem in found[1:]:
                print(_line("", "", "", "", "", "", problem))
            wrong += found
            damaged += bool(found)
        stale = _stale_latest(place)
        if stale is not None:
            print(stale)
            wrong.append(stale)
        for note in _notes(place.folder):
            print(note)
    if not count:
        raise UserError(f"{words[0]}: no complete checkpoint there: only saves that did not finish")
    if damaged:
        raise UserError(
            f"{damaged} of {count} checkpoints {'is' if damaged == 1 else 'are'} not whole ({wrong[0]}):"
            " restore the file from a copy, or resume from another checkpoint"
        )
    if wrong:
        raise UserError(wrong[0])


def check(checkpoint: Path, *, hashes: bool) -> list[str]:
    """As `problems`, with files that the manifest does not list, and files that cannot be read."""
    try:
        found = problems(checkpoint, hashes=hashes)
        manifest = None if found else read_manifest(checkpoint)
    except OSError as error:
        return [f"{error.filename or checkpoint}: {error.strerror or error}"]
    if manifest is not None:
        found = [f"{checkpoint / path}: not in the manifest" for path in unlisted(checkpoint, manifest)]
    return found


def _stale_latest(place: Found) -> str | None:
    name = place.latest
    if name is None or place.folder is None or (NAME.fullmatch(name) and (place.folder / name / MANIFEST).is_file()):
        return None
    return (
        f"{place.folder / LATEST}: names {name!r}, which is no complete checkpoint: a resume takes the newest complete"
        " one, and the next save writes it anew"
    )


def _notes(folder: Path | None) -> list[str]:
    """A line for everything that a save or a resume has left behind and that is no checkpoint."""
    notes = []
    for path in sorted(folder.iterdir()) if folder is not None else []:
        match = HIDDEN.fullmatch(path.name)
        if match is None:
            continue
        name, kind = match.groups()
        what = LEFT[kind]
        if kind == "replaced" and not path.with_name(name).exists():
            what = f"{name} as it was before its step was saved again, which did not finish; the next start restores it"
        notes.append(f"{path}: no checkpoint: {what}")
    return notes


def _list(words: Sequence[str], flags: Flags) -> None:
    if len(words) != 1:
        raise UserError(f"checkpoint list takes one run directory or checkpoint, got {len(words)}")
    place = find(Path(words[0]))
    latest = place.latest
    rows = [{**facts(path), "latest": path.name == latest} for path in place.checkpoints]
    if "--json" in flags:
        print(json.dumps({"folder": str(place.folder or words[0]), "latest": latest, "checkpoints": rows}, indent=2))
        return
    print(_line("checkpoint", "step", "size", "ranks", "ZeRO", "format", "written"))
    for row in rows:
        when = (
            "" if not row.get("written") else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["written"] / 1e9))
        )
        end = row["problem"] or f"{when:<19}"
        print(_line(*_cells(row), f"{end}  latest" if row["latest"] else end))
    for note in [_stale_latest(place), *_notes(place.folder)]:
        if note is not None:
            print(note)


def _cells(row: dict[str, Any]) -> list[str]:
    if row["problem"] is not None:
        return [row["name"], "-", "-", "-", "-", "-"]
    ranks = f"{row['world']} (data {row['data']} x sequence {row['sequence']})"
    return [row["name"], str(row["step"]), human_bytes(row["bytes"]), ranks, str(row["zero_stage"]), str(row["format"])]


def _line(*cells: str) -> str:
    name, step, size, ranks, stage, kind, end = cells
    return f"{name:<18} {step:>8} {size:>10}  {ranks:<26} {stage:>4}  {kind:<9}  {end}".rstrip()


def _convert(words: Sequence[str], flags: Flags) -> None:
    if len(words) != 2:
        raise UserError(
            "checkpoint convert needs CHECKPOINT and the new folder DIR (see mnemos checkpoint convert --help)"
        )
    choose_accelerator()
    source, out = Path(words[0]), Path(words[1])
    other = check_format(flags)
    if other == "--from":
        from_native(source, out)
        return
    place = find(source)
    checkpoint: Path | None = source
    if place.folder is not None:
        checkpoint = newest(place.folder)
        if checkpoint is None:
            raise UserError(f"{source}: no complete checkpoint there: only saves that did not finish")
    assert checkpoint is not None
    if other == "--to":
        to_native(checkpoint, out, flags.get(TOKENIZER))
    else:
        to_universal(checkpoint, out)


_COMMANDS: dict[str, tuple[Callable[[Sequence[str], Flags], None], str, tuple[str, ...], tuple[str, ...]]] = {
    "verify": (_verify, VERIFY, ("--quick",), ()),
    "list": (_list, LIST, ("--json",), ()),
    "convert": (_convert, CONVERT, (), FORMAT_FLAGS),
}
"""What each does, its help, its flags without and with a value."""
