"""Which token files `--data.tokens` names, and with which shares."""

from __future__ import annotations

import dataclasses
import glob
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from pipeline.data.tokens.blocks import cache_folder
from pipeline.data.tokens.remote import Served, look_up
from pipeline.data.tokens.urls import is_whole, shown_names
from pipeline.data_config import DataConfig
from pipeline.errors import UserError
from pipeline.files.given_path import expanded

SUFFIXES = (".npy", ".bin")
_URL = re.compile(r"https?://", re.IGNORECASE)
_TOLERANCE = Fraction(1, 10**6)


@dataclass(frozen=True)
class TokenName:
    """A file or URL, and what a resume knows it by."""

    name: str
    identity: str
    served: Served | None = None
    """What its server says of a URL; None where it was not asked."""

    @property
    def is_url(self) -> bool:
        return _URL.match(self.name) is not None

    @property
    def shown(self) -> str:
        """For messages."""
        return shown_names(self.name)


@dataclass(frozen=True)
class TokenSource:
    """Files whose windows are shuffled together, and their share of all windows."""

    given: str
    ratio: Fraction
    files: tuple[TokenName, ...]


@dataclass(frozen=True)
class TokenListing:
    """What was found at one moment, for all ranks."""

    training: tuple[TokenSource, ...]
    held_out: tuple[TokenSource, ...] | None
    """None where a part of the training files is held out."""

    @property
    def evaluated(self) -> tuple[TokenSource, ...]:
        """The files that evaluations read."""
        return self.training if self.held_out is None else self.held_out


def list_token_data(data: DataConfig, *, ask_servers: bool = False) -> TokenListing:
    """The files of `--data.tokens` and `--data.held-out-tokens`; with `ask_servers`, what is said of URLs too. Raises
    UserError."""
    training = list_tokens(data.tokens)
    held_out = list_tokens(data.held_out_tokens, "--data.held-out-tokens") if data.held_out_tokens else None
    if ask_servers:
        known = asked((*training, *(held_out or ())), data)
        training, held_out = known[: len(training)], held_out and known[len(training) :]
    return TokenListing(training, held_out)


def asked(sources: Sequence[TokenSource], data: DataConfig) -> tuple[TokenSource, ...]:
    """The sources with what servers say of their URLs: those that were not asked are, many at once. Raises
    UserError."""
    urls = [file.name for source in sources for file in source.files if file.is_url and file.served is None]
    found = look_up(urls, cache_folder(data.token_cache))
    return tuple(
        dataclasses.replace(
            source,
            files=tuple(dataclasses.replace(file, served=file.served or found.get(file.name)) for file in source.files),
        )
        for source in sources
    )


def list_tokens(entries: Sequence[str], flag: str = "--data.tokens") -> tuple[TokenSource, ...]:
    """The sources that a flag names: one of all files, or one per NAME=RATIO. Raises UserError."""
    split = [_split(entry, flag) for entry in entries]
    with_ratio = [entry for entry, (_, ratio) in zip(entries, split, strict=True) if ratio is not None]
    if not with_ratio:
        found = [file for entry in entries for file in _files(entry, flag)]
        _refuse_twice(found, flag)
        name = ", ".join(entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")
        return (TokenSource(name, Fraction(1), tuple(found)),)
    if len(with_ratio) < len(entries):
        without = next(entry for entry in entries if entry not in with_ratio)
        raise UserError(
            f"{flag} {shown_names(without)} has no ratio, and {shown_names(with_ratio[0])} has one: give NAME=RATIO for"
            " each, or none"
        )
    total = sum((ratio for _, ratio in split if ratio is not None), Fraction())
    if abs(total - 1) > _TOLERANCE:
        raise UserError(f"{flag}: the ratios sum to {float(total):g}, not to 1: give shares of the windows")
    sources = [
        TokenSource(name, ratio / total, tuple(_files(name, flag))) for name, ratio in split if ratio is not None
    ]
    _refuse_twice([file for source in sources for file in source.files], flag)
    return tuple(sources)


def names_of(entries: Sequence[str]) -> list[str]:
    """The files that the entries of a flag name, without ratios; a folder or pattern whose files are not on this
    machine stands for itself."""
    flag = "--data.tokens"
    found: list[str] = []
    for name, _ in (_split(entry, flag) for entry in entries):
        try:
            found += [file.name for file in _files(name, flag)]
        except UserError:
            # Of a checkpoint from elsewhere.
            found.append(name)
    return found


def _split(entry: str, flag: str) -> tuple[str, Fraction | None]:
    """NAME and RATIO of NAME=RATIO; a file of the whole name has no ratio, nor has the value at the end of a URL's
    query, nor a URL without a file's suffix that ends with a number above 1, such as https://host/part=3."""
    name, equals, ratio = entry.rpartition("=")
    if not (equals and name) or _is_query_value(entry):
        return entry, None
    # A URL may be longer than any path.
    if not _URL.match(entry) and expanded(entry).exists():
        return entry, None
    try:
        value = float(ratio)
    except ValueError:
        return entry, None
    if not 0 < value < math.inf:
        raise UserError(f"{flag} {shown_names(entry)}: {ratio} is no share: give a number above 0")
    if value > 1 and _URL.match(entry) and not name.partition("?")[0].endswith(SUFFIXES):
        return entry, None
    return name, Fraction(ratio)


def _is_query_value(entry: str) -> bool:
    """Whether the last `=` of an entry is that of a parameter in a URL."""
    _, mark, query = entry.partition("?")
    return _URL.match(entry) is not None and bool(mark) and re.split("[&;]", query)[-1].count("=") == 1


def _refuse_twice(files: Sequence[TokenName], flag: str) -> None:
    seen: set[str] = set()
    for file in files:
        real = file.name if file.is_url else str(Path(file.name).resolve())
        if real in seen:
            raise UserError(f"{flag} names {file.shown} twice: an epoch reads every window once, so give it once")
        seen.add(real)


def _files(given: str, flag: str) -> list[TokenName]:
    """The files that one name stands for: a file, those of a folder, those that a pattern matches, or a URL."""
    if _URL.match(given):
        if not is_whole(given):
            raise UserError(f"{flag} {shown_names(given)} is no URL that can be asked for: check the address")
        return [TokenName(given, given.partition("?")[0].rpartition("/")[2] or given)]
    path = expanded(given)
    if path.is_dir():
        below = (file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        parts = sorted((file.relative_to(path).as_posix(), file) for file in below)
        found = [TokenName(str(file), part) for part, file in parts if not any(p[0] == "." for p in part.split("/"))]
        if not found:
            raise UserError(f"{flag} {given} holds no {' or '.join(SUFFIXES)} file: name another folder, or the files")
        return found
    if path.is_file():
        return [TokenName(str(path), path.name)]
    if glob.has_magic(given):
        matched = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).suffix in SUFFIXES)
        if matched:
            return [TokenName(file, Path(file).name) for file in matched]
        raise UserError(f"{flag} {given} matches no {' or '.join(SUFFIXES)} file: check the pattern")
    raise UserError(f"{flag} {given} does not exist: check the path")
