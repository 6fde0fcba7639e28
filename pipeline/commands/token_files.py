"""`data inspect` and `data verify`: what is in token files, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.commands.flags import parse_flags
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.tokenizer import Tokenizer
    from pipeline.data.tokens.sidecar import Sidecar

Dtype = Literal["auto", "uint16", "uint32"]


@dataclass(frozen=True)
class InspectOptions:
    """Shows the documents of a token file, or those that a step of a run has read."""

    at: int = 0
    """Token of the file; the document that holds it is the first that is shown."""
    count: int = 1
    """Documents to show; of a step: rows to show, 0 for all."""
    step: int | None = None
    """Step of a run, whose folder or checkpoint is given in place of a file."""
    characters: int = 200
    """Characters of text to show of each document; 0: all."""
    tokenizer: str | None = None
    """In place of the one that the sidecar or the run names."""
    eos_id: int | None = None
    """Id that ends documents; default: that of the sidecar or the tokenizer."""
    dtype: Dtype = "auto"
    """Of a file without a sidecar."""
    header: bool = False
    """The file begins with NumPy's header."""


@dataclass(frozen=True)
class VerifyOptions:
    """Checks token files: header, dtype, size, vocabulary, ends of documents, hash. Exit code 2 when a check fails."""

    tokenizer: str | None = None
    """For files without a sidecar: its vocabulary and end-of-document id."""
    vocab_size: int | None = None
    """For files without a sidecar: ids are below this."""
    eos_id: int | None = None
    """For files without a sidecar: the id that ends documents."""
    dtype: Dtype = "auto"
    """What the files must hold."""
    header: bool = False
    """The files begin with NumPy's header."""


def run_inspect(words: Sequence[str]) -> None:
    """`data inspect PLACE [flags]`. Raises UserError."""
    places, flags = _split(words)
    options: InspectOptions = parse_flags(InspectOptions(), flags, "mnemos data inspect FILE")
    if len(places) != 1:
        raise UserError("data inspect needs one token file, or the folder of a run with --step")
    if options.step is None and Path(places[0]).is_dir():
        raise UserError(f"data inspect {places[0]} is a folder: name a file in it, or give the --step of a run")
    if options.step is None:
        _inspect_file(places[0], options)
    else:
        _inspect_step(Path(places[0]), options, options.step)


def _inspect_file(name: str, options: InspectOptions) -> None:
    import itertools

    from pipeline.data.tokens.build import open_token_file, sidecar_of
    from pipeline.data.tokens.documents import documents_from
    from pipeline.data.tokens.files import COMMAND_FLAGS
    from pipeline.data.tokens.listing import list_tokens
    from pipeline.data_config import DataConfig

    if options.count < 1:
        raise UserError(f"--count is {options.count}: give 1 or more")
    (source,) = list_tokens([name], "data inspect")
    if len(source.files) > 1:
        raise UserError(
            f"data inspect {name} names {len(source.files)} files: name one, such as {source.files[0].name}"
        )
    sidecar = sidecar_of(source.files[0])
    tokenizer = _tokenizer(options.tokenizer, sidecar, source.files[0].shown)
    data = DataConfig(token_dtype=options.dtype, token_header=options.header)
    file, _ = open_token_file(source.files[0], data, tokenizer.vocab_size, flags=COMMAND_FLAGS)
    eos_id = options.eos_id if options.eos_id is not None else sidecar.eos_id if sidecar else tokenizer.eos_id
    for document in itertools.islice(documents_from(file, sidecar, eos_id, options.at), options.count):
        of = f", document {document.number} of {document.source}" if document.source is not None else ""
        print(f"tokens {document.start} to {document.stop - 1} ({document.tokens}){of}")
        print(_text(tokenizer, file.read(document.start, document.tokens), options.characters))


def _inspect_step(folder: Path, options: InspectOptions, step: int) -> None:
    from pipeline.checkpoint.loader_state import read_loader_state
    from pipeline.checkpoint.manifest import MANIFEST, manifest_with
    from pipeline.config_file import load_config
    from pipeline.data.run_tokenizer import run_tokenizer
    from pipeline.data.tokens.seen import windows_seen
    from pipeline.data.tokens.sidecar import makers_of
    from pipeline.evals.command import find_checkpoint_folder
    from pipeline.recipes import all_recipes

    if step < 1:
        raise UserError(f"--step is {step}: steps are counted from 1")
    checkpoint = find_checkpoint_folder(folder)
    if not (checkpoint / MANIFEST).is_file():
        raise UserError(
            f"{checkpoint} is no checkpoint: give the folder of a run that has saved one, or a checkpoint's"
        )
    manifest = manifest_with(checkpoint, "global_batch", "step")
    config = load_config(checkpoint / "config.yaml", all_recipes())
    state = read_loader_state(checkpoint)
    if not state:
        raise UserError(
            f"{checkpoint} was converted from another trainer's folder, which does not say what its steps have read:"
            " give a run that went on from it"
        )
    if not config.data.tokens:
        raise UserError(f"{folder} has read documents, not token files: what a step of it has read is not known")
    rows = int(manifest["global_batch"])
    seen = windows_seen(
        config, state, rows=rows, step=step, saved_at=int(manifest["step"]), eos_id=options.eos_id,
    )  # fmt: skip
    tokenizers: dict[str, Tokenizer] = {}
    print(f"step {step}: {rows} windows of {config.sequence_length} tokens")
    for window in seen:
        if options.count and window.row >= options.count:
            print(f"... {rows - window.row} more rows: --count 0 shows all")
            break
        stop = window.start + config.sequence_length
        print(f"row {window.row}: {window.file.name} tokens {window.start} to {stop - 1}")
        makers = makers_of([window.sidecar])
        key = str(makers)
        if window.documents and key not in tokenizers:
            if options.tokenizer is not None:
                tokenizers[key] = _tokenizer(options.tokenizer, window.sidecar, window.file.name)
            else:
                # Older checkpoints do not say how many ids their model has.
                vocab_size = int(state.get("vocab_size", 0))
                tokenizers[key] = run_tokenizer(config.data, vocab_size, makers, fix="give --tokenizer")
        for document in window.documents:
            first, last = max(document.start, window.start), min(document.stop, stop)
            of = f", document {document.number} of {document.source}" if document.source is not None else ""
            print(f"  tokens {first} to {last - 1} of {document.start} to {document.stop - 1}{of}")
            print(f"    {_text(tokenizers[key], window.file.read(first, last - first), options.characters)}")


def _tokenizer(given: str | None, sidecar: Sidecar | None, name: str) -> Tokenizer:
    """The tokenizer that is given, or that the sidecar names. Raises UserError."""
    from pipeline.data.tokenizer import load_tokenizer

    chosen = given or (sidecar.tokenizer if sidecar is not None else None)
    if chosen is None:
        raise UserError(f"{name} has no sidecar that names its tokenizer: give --tokenizer")
    tokenizer = load_tokenizer(chosen)
    if sidecar is not None and tokenizer.fingerprint != sidecar.tokenizer_fingerprint:
        raise UserError(
            f"{name} was made with another tokenizer than {chosen} is now: give --tokenizer with the one it was"
        )
    return tokenizer


def _text(tokenizer: Tokenizer, ids: object, characters: int) -> str:
    """In one line, at most so many characters."""
    text = repr(tokenizer.decode(ids))  # type: ignore[arg-type]
    return text if not characters or len(text) <= characters else text[:characters] + "..."


def run_verify(words: Sequence[str]) -> None:
    """`data verify FILE ... [flags]`. Raises UserError when a check fails."""
    places, flags = _split(words)
    options: VerifyOptions = parse_flags(VerifyOptions(), flags, "mnemos data verify FILE ...")
    if not places:
        raise UserError("data verify needs token files, folders or patterns")
    from pipeline.data.tokenizer import load_tokenizer
    from pipeline.data.tokens.listing import list_tokens
    from pipeline.data.tokens.verify import Expected, verify

    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    vocab_size, eos_id = options.vocab_size, options.eos_id
    if tokenizer is not None:
        vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        eos_id = tokenizer.eos_id if eos_id is None else eos_id
    expected = Expected(None if options.dtype == "auto" else options.dtype, vocab_size, eos_id, options.header)
    failed: list[str] = []
    fix = ""
    # Also with ratios, as they stand in --data.tokens.
    for file in (file for source in list_tokens(places, "data verify") for file in source.files):
        if file.is_url:
            raise UserError(f"data verify reads every byte of local files: download {file.shown} first")
        for check in verify(Path(file.name), expected):
            state = {True: "ok", False: "FAILED", None: "not checked"}[check.ok]
            print(f"{file.name}  {check.name:<10}  {state:<11}  {check.found}", flush=True)
            if check.ok is False:
                fix = fix if failed else check.fix
                failed.append(f"{file.name}: {check.name}: {check.found}")
    if failed:
        count = f"{len(failed)} checks failed" if len(failed) > 1 else "a check failed"
        raise UserError(f"{count} ({failed[0]})" + (f": {fix}" if fix else ""))


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The places before the first flag, and the flags."""
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    return list(words[:first]), list(words[first:])
