"""`data prepare`, `data inspect`, `data verify` and `data synth`: files to train on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.commands.flags import parse_flags, wants_help
from pipeline.errors import UserError
from pipeline.spelling import did_you_mean, nearest

USAGE = """\
usage: mnemos data prepare --path PATH ... --tokenizer NAME --out DIR [flags]
       mnemos data inspect FILE [--at POSITION] [--count N] [flags]
       mnemos data inspect RUN --step S [flags]
       mnemos data verify FILE|FOLDER ... [flags]
       mnemos data synth SYSTEM --out FILE --count N [flags]

Token files: tokenise documents, look at what is in them and at what a step of a run has read, and check them. Of a
system that reads files of another kind, `verify` checks those too, and `synth` makes some from a known process. Each
command takes --help."""


def _as_in_a_run(name: str) -> object:
    """The flag of a run is known too: messages name it."""
    return tyro.conf.arg(aliases=[f"--data.{name}"])


@dataclass(frozen=True)
class PrepareOptions:
    """Tokenises documents into files that `--data.tokens` reads."""

    path: Annotated[tuple[str, ...], _as_in_a_run("path")] = ()
    """Files, folders or globs of .txt, .md, .py, .jsonl, .json or .parquet documents, text and JSON also compressed
    (.gz, .zst, .bz2, .xz)."""
    dataset: Literal["stdlib"] | None = None
    """In place of files: the source files of this machine's Python standard library."""
    tokenizer: Annotated[str, _as_in_a_run("tokenizer")] = ""
    """`bytes`, a sentencepiece .model file, or the folder or hub name of a Hugging Face tokenizer."""
    out: Path | None = None
    """Folder for the token files. What an earlier, stopped call has written there stays."""
    text_field: Annotated[str, _as_in_a_run("text-field")] = "text"
    """Column or key that holds a document's text."""
    workers: int = 0
    """Processes; 0: one per core. The files do not depend on it."""
    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """Of the ids. auto: uint16 for a vocabulary of at most 65,536 ids, as OLMo's tools expect it."""
    file_mb: int = 512
    """Megabytes (2**20 bytes) of text per token file, about."""
    on_bad_record: Annotated[Literal["stop", "skip"], _as_in_a_run("on-bad-record")] = "stop"
    """stop: a record that cannot be read ends the command; skip: it is named and left out."""
    trust_remote_code: Annotated[bool, _as_in_a_run("trust-remote-code")] = False
    """Run the Python code that comes with a tokenizer."""


def run_data(words: Sequence[str]) -> None:
    """The command. Raises UserError."""
    if words and wants_help(words[:1]):
        print(USAGE)
        return
    if not words or words[0] not in _COMMANDS:
        given = f"{words[0]!r}{did_you_mean(nearest(words[0], _COMMANDS))}" if words else "none"
        raise UserError(f"data needs one of {', '.join(_COMMANDS)} (got {given})")
    _COMMANDS[words[0]](list(words[1:]))


def _prepare(words: Sequence[str]) -> None:
    options: PrepareOptions = parse_flags(PrepareOptions(), words, "mnemos data prepare")
    if bool(options.path) == bool(options.dataset):
        raise UserError("data prepare needs --path PATH ..., or else --dataset stdlib: name the documents")
    if not options.tokenizer:
        raise UserError("data prepare needs --tokenizer: `bytes`, a .model file, or a folder or Hub name")
    if options.out is None:
        raise UserError("data prepare needs --out: the folder for the token files")
    for flag, value in {"--workers": options.workers + 1, "--file-mb": options.file_mb}.items():
        if value < 1:
            raise UserError(f"{flag} is too small: give {'0' if flag == '--workers' else '1'} or more")
    from pipeline.data.records import RecordLog
    from pipeline.data.sources.listing import list_files
    from pipeline.data.sources.local import LocalFiles, standard_library
    from pipeline.data.tokenizer import load_tokenizer
    from pipeline.data.tokens.chunks import Job
    from pipeline.data.tokens.prepare import prepare
    from pipeline.files.output import writing
    from pipeline.runtime.folder_lock import FolderLock

    tokenizer = load_tokenizer(options.tokenizer, options.trust_remote_code)
    dtype = _dtype(options, tokenizer.vocab_size)
    skip = options.on_bad_record == "skip"
    if options.dataset is not None:
        source = standard_library()
    else:
        source = LocalFiles(list_files(options.path, options.out), text_field=options.text_field, skip=skip)
    print(source.describe())
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    report = _Report(begun)
    with FolderLock() as lock:
        lock.acquire(options.out, timeout=0, flag="--out")
        prepare(
            Job(source, options.tokenizer, options.trust_remote_code, dtype),
            tokenizer,
            options.out,
            RecordLog(skip=skip, remedy="correct it, or leave such records out with --on-bad-record skip"),
            workers=options.workers or _cores(),
            file_bytes=options.file_mb << 20,
            report=report,
        )
    print(report.total(options.out))


class _Report:
    """A line per file, and their sum."""

    def __init__(self, begun: float) -> None:
        self.begun, self.files, self.documents, self.tokens, self.new = begun, 0, 0, 0, 0

    def __call__(self, found: object) -> None:
        from pipeline.data.tokens.prepare import Prepared

        assert isinstance(found, Prepared)
        self.files += 1
        self.documents += found.sidecar.documents
        self.tokens += found.sidecar.tokens
        self.new += 0 if found.was_there else found.sidecar.tokens
        note = ", there already" if found.was_there else ""
        facts = f"{found.sidecar.documents:,} documents, {found.sidecar.tokens:,} tokens, {found.sidecar.dtype}"
        print(f"{found.path}: {facts}{note}", flush=True)

    def total(self, out: Path) -> str:
        seconds = time.perf_counter() - self.begun
        speed = f", {self.new / seconds:,.0f} tokens/s" if self.new else ""
        return f"{out}: {self.documents:,} documents, {self.tokens:,} tokens in {self.files:,} files{speed}"


def _dtype(options: PrepareOptions, vocab_size: int) -> str:
    least = "uint16" if vocab_size <= 1 << 16 else "uint32"
    if options.dtype == "uint16" and least == "uint32":
        raise UserError(
            f"--dtype uint16 holds ids up to 65,535, and {options.tokenizer} has {vocab_size:,} ids: give uint32"
        )
    return least if options.dtype == "auto" else options.dtype


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _inspect(words: list[str]) -> None:
    from pipeline.commands.token_files import run_inspect

    run_inspect(words)


def _verify(words: list[str]) -> None:
    from pipeline.commands.system_data import verified
    from pipeline.commands.token_files import run_verify

    if not verified(words):
        run_verify(words)


def _synth(words: list[str]) -> None:
    from pipeline.commands.system_data import run_synth

    run_synth(words)


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "prepare": _prepare,
    "inspect": _inspect,
    "verify": _verify,
    "synth": _synth,
}
