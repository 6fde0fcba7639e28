"""Which files `--data.path` names: files, folders and globs, each file and folder once, and what is passed over."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.sources.compressed import CODECS
from pipeline.errors import UserError
from pipeline.files.given_path import expanded

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".json")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES

_RUN_FILES = ({"run.json", "config.yaml", "ds_config.json"}, {"manifest.json", "trainer_state.json"})
"""What a run directory holds, and a checkpoint wherever it lies: its JSON is no data."""
_OWN_FILES = frozenset({"run.json", "config.yaml", "ds_config.json", "metrics.jsonl"})
_BARE = "without extension"
_RUN, _SAVED, _LINK = "run directory", "folder of save_to_disk", "broken link"
_LOCKED, _SPECIAL = "folder that may not be listed", "special file"
_PLURALS = {
    _RUN: "run directories",
    _SAVED: "folders of save_to_disk",
    _LINK: "broken links",
    _LOCKED: "folders that may not be listed",
    _SPECIAL: "special files",
}
_READABLE = ", ".join(SUFFIXES[:-1]) + " or " + SUFFIXES[-1]


@dataclass(frozen=True)
class LocalFile:
    """A file and its identity: its path below the folder that was asked for, so that the hold-out survives a move."""

    path: Path
    identity: str


@dataclass(frozen=True)
class Listing:
    """What was found at one moment; every rank reads the list of rank 0."""

    name: str
    files: tuple[LocalFile, ...]
    passed_over: dict[str, int]
    """Files by extension, and other things by what they are, that no document is read from."""

    def notes(self) -> str:
        """What was passed over, in words; empty when nothing was."""
        return ", ".join(_counted(what, count) for what, count in sorted(self.passed_over.items()))


def file_format(name: str) -> tuple[str, str | None] | None:
    """(suffix, codec or None) of a file that can be read, by its name; None for any other."""
    stem, suffix = os.path.splitext(name.lower())
    codec = CODECS.get(suffix)
    if codec is not None:
        suffix = os.path.splitext(stem)[1]
        return (suffix, codec) if suffix in TEXT_SUFFIXES + JSON_SUFFIXES else None
    return (suffix, None) if suffix in SUFFIXES else None


def list_files(paths: Sequence[str], output_dir: Path | None = None, *, flag: str = "--data.path") -> Listing:
    """The files that a flag names, in sorted order for each path. Raises UserError.

    Below a folder or a pattern, hidden files, run directories and `output_dir` are left out, there or not yet.
    """
    found: dict[Path, LocalFile] = {}
    passed: Counter[str] = Counter()
    own = None if output_dir is None else os.path.realpath(output_dir)
    for given in paths:
        search = _Search(given, own, flag)
        try:
            files = search.files()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{search.what} cannot be read ({reason}): check the path") from error
        passed.update(search.passed)
        for file in files:
            found.setdefault(file.path.resolve(), file)
    name = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    return Listing(name, tuple(found.values()), dict(passed))


class _Search:
    """What one of the paths names. `own`: the real path of the run's own directory."""

    def __init__(self, given: str, own: str | None, flag: str) -> None:
        self.given, self.own, self.what = given, own, f"{flag} {given}"
        self.passed: Counter[str] = Counter()
        self._kinds: dict[Path, str | None] = {}

    def files(self) -> list[LocalFile]:
        path = expanded(self.given)
        if path.is_dir():
            self._refuse_folder(path)
            found, shown = self._below(path, path), "holds"
        elif path.is_file():
            self._refuse_file(path)
            return [LocalFile(path, path.name)]
        elif path.exists():
            raise UserError(f"{self.what} is neither a file nor a folder: name files")
        elif glob.has_magic(self.given):
            found, shown = self._matching(path), "matches"
        else:
            raise UserError(f"{self.what} does not exist: check the path")
        if not found:
            notes = Listing("", (), dict(self.passed)).notes()
            passed_over = f" (passed over: {notes})" if notes else ""
            fix = "name another folder" if shown == "holds" else "check the pattern"
            raise UserError(f"{self.what} {shown} no {_READABLE} file{passed_over}: {fix}")
        return found

    def _below(self, folder: Path, root: Path) -> list[LocalFile]:
        """Files below `folder`, sorted; each folder once however many links lead to it. What is there by itself comes
        before what links lead to, so that a link changes the identity of no file."""
        found: list[LocalFile] = []
        pending, links, seen = deque([folder]), deque[Path](), set[str]()
        while pending or links:
            here = pending.popleft() if pending else links.popleft()
            real = os.path.realpath(here)
            if real in seen:
                continue
            seen.add(real)
            try:
                with os.scandir(here) as scanned:
                    entries = sorted(scanned, key=lambda entry: entry.name)
            except OSError:
                self.passed[_LOCKED] += 1
                continue
            kind = None if here == folder else self._kind({entry.name for entry in entries}, real)
            if kind is not None:
                self.passed[kind] += 1
                continue
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__pycache__":
                    continue
                path = here / entry.name
                is_folder, is_file = _leads_to(entry)
                if is_folder:
                    (links if entry.is_symlink() else pending).append(path)
                elif self._is_readable(path, is_file):
                    found.append(LocalFile(path, path.relative_to(root).as_posix()))
        return sorted(found, key=lambda file: file.identity)

    def _matching(self, pattern: Path) -> list[LocalFile]:
        """Files that a pattern matches, and files below the folders that it matches."""
        fixed = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
        root, rest = Path(*pattern.parts[:fixed]), pattern.parts[fixed:]
        if "**" in rest:
            if not root.is_dir():
                return []
            self._refuse_folder(root)
            # Not by glob, which goes round in links that lead back, twice as often at each.
            matched = [(_matched_part(file.identity, rest), file) for file in self._below(root, root)]
            return [file for part, file in sorted(matched, key=lambda pair: (pair[0] or "", pair[1].identity))
                    if part is not None]  # fmt: skip
        found = []
        for match in sorted(map(Path, glob.glob(str(pattern)))):
            if "__pycache__" in match.parts:
                continue
            folders = [Path(*match.parts[:length]) for length in range(fixed + 1, len(match.parts) + match.is_dir())]
            if any(self._is_run(folder) for folder in folders):
                self.passed[_RUN] += 1
            elif match.is_dir():
                found += self._below(match, root)
            elif match.name in _OWN_FILES and self._is_run(match.parent):
                self.passed[match.suffix] += 1
            elif self._is_readable(match, match.is_file()):
                found.append(LocalFile(match, match.relative_to(root).as_posix()))
        return found

    def _is_readable(self, path: Path, is_file: bool) -> bool:
        """Whether documents can be read from a file; if not, it is noted."""
        if is_file and file_format(path.name) is not None:
            return True
        broken = not is_file and path.is_symlink() and not path.exists()
        self.passed[_extension(path.name) if is_file else _LINK if broken else _SPECIAL] += 1
        return False

    def _kind(self, names: set[str], real: str) -> str | None:
        """What a folder is that no documents are read from; None for any other."""
        if real == self.own or any(files <= names for files in _RUN_FILES):
            return _RUN
        return _SAVED if is_saved_to_disk(names) else None

    def _is_run(self, folder: Path) -> bool:
        if folder not in self._kinds:
            try:
                names = set(os.listdir(folder))
            except OSError:  # what cannot be listed is passed over where its files are asked for
                names = set()
            self._kinds[folder] = self._kind(names, os.path.realpath(folder))
        return self._kinds[folder] == _RUN

    def _refuse_folder(self, folder: Path) -> None:
        names = set(os.listdir(folder))
        if is_saved_to_disk(names):
            raise saved_to_disk(self.what)
        if os.path.realpath(folder) == self.own:
            raise UserError(f"{self.what} is also --output-dir: name another --output-dir")
        if any(files <= names for files in _RUN_FILES):
            raise UserError(f"{self.what} is the folder of a run, not of documents: name another")

    def _refuse_file(self, path: Path) -> None:
        if file_format(path.name) is None:
            shown = _extension(path.name)
            ending = "has no extension" if shown == _BARE else f"ends in {shown!r}"
            raise UserError(
                f"{self.what} {ending}: {_READABLE} files can be read, text and JSON also with .gz, .zst,"
                " .bz2 or .xz behind it"
            )
        if path.stat().st_size == 0:
            raise UserError(f"{self.what} is empty: name a file with documents")


def is_saved_to_disk(names: set[str]) -> bool:
    """Whether a folder with such files is what `datasets.Dataset.save_to_disk` writes."""
    return {"state.json", "dataset_info.json"} <= names or "dataset_dict.json" in names


def saved_to_disk(flag: str) -> UserError:
    """What to do with such a folder; `flag` is the flag with its value."""
    return UserError(
        f"{flag} is a folder of datasets' save_to_disk, which only that library reads: write its splits with"
        " load_from_disk(...).to_parquet(FILE) and give the files to --data.path"
    )


def _leads_to(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Whether an entry is a folder, and whether a file; neither for a link that leads to itself."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError:
        return False, False


def _matched_part(identity: str, pattern: Sequence[str]) -> str | None:
    """The shortest part of a path, from its start, that a pattern matches; None where it matches none."""
    parts = identity.split("/")
    heads = (parts[:length] for length in range(len(parts) + 1))
    return next(("/".join(head) for head in heads if _matches(head, pattern)), None)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path are those of a pattern, `**` being any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _extension(name: str) -> str:
    stem, suffix = os.path.splitext(name.lower())
    return (os.path.splitext(stem)[1] if suffix in CODECS else "") + suffix or _BARE


def _counted(what: str, count: int) -> str:
    return f"{count} {what if count == 1 else _PLURALS.get(what, what)}"
