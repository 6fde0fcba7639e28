"""From a run's configuration to its loader of token files."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.run_tokenizer import run_tokenizer
from pipeline.data.sources.content import hash_contents, places_read
from pipeline.data.sources.readers import unreadable
from pipeline.data.tokens.blocks import cache_folder
from pipeline.data.tokens.files import (
    HEAD_BYTES,
    RUN_FLAGS,
    Flags,
    LocalTokenFile,
    OpenFiles,
    TokenFile,
    check_head,
    layout_of,
)  # fmt: skip
from pipeline.data.tokens.listing import TokenListing, TokenName, TokenSource, asked
from pipeline.data.tokens.loader import WindowLoader
from pipeline.data.tokens.remote import Remote, RemoteTokenFile, fetch_sidecar, fetch_sidecars, look_up, open_remote
from pipeline.data.tokens.sidecar import FIX, Sidecar, makers_of, read_sidecar
from pipeline.data.tokens.urls import shown_names
from pipeline.data.tokens.windows import Side, Windows
from pipeline.data_config import DataConfig
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.parallel.topology import Topology


def build_window_loader(
    config: RunConfig, topology: Topology, files: TokenListing, *, vocab_size: int, held_out: bool
) -> WindowLoader:
    """The loader of this data rank. `vocab_size` is the model's. Raises UserError."""
    data, rows = config.data, config.evaluation.batch_size if held_out else 0
    listed = asked(files.evaluated if held_out else files.training, data)
    side: Side = "all" if files.held_out is not None else "held_out" if held_out else "training"
    open_files = OpenFiles()
    # Kept until the files are open.
    remotes = [_remote(file, data) for source in listed for file in source.files if file.is_url]
    for remote in remotes:
        remote.ahead(0, min(HEAD_BYTES, remote.size))
    opened = [[open_token_file(file, data, vocab_size, open_files) for file in source.files] for source in listed]
    sources = [
        Windows(shown_names(source.given), [file for file, _ in pairs], config.sequence_length, side, data.holdout)
        for source, pairs in zip(listed, opened, strict=True)
    ]
    beside = [pair for pairs in opened for pair in pairs]
    eos_id = eos_of(beside, data, vocab_size) if data.document_mask else None
    return WindowLoader(
        sources,
        [source.ratio for source in listed],
        batch_size=rows or config.batch_size,
        vocab_size=vocab_size,
        fingerprint=functools.partial(_fingerprint, listed, sources, data, topology, held_out=held_out, eos_id=eos_id),
        grad_accum=1 if rows else config.grad_accum,
        data_rank=topology.data_rank,
        data_degree=topology.data,
        seed=0 if held_out else config.seed,
        shuffle=data.shuffle,
        eos_id=eos_id,
        prefetch=not held_out,
        accept_change=data.on_change == "accept",
        makers=makers_of(sidecar for _, sidecar in beside),
    )


def open_token_file(
    file: TokenName, data: DataConfig, vocab_size: int, files: OpenFiles | None = None, *, flags: Flags = RUN_FLAGS
) -> tuple[TokenFile, Sidecar | None]:
    """A file that begins as one of its dtype and vocabulary does, and its sidecar, which it fits. Raises UserError."""
    sidecar = sidecar_of(file)
    dtype = dtype_of(file.shown, sidecar, data, vocab_size, flags)
    remote = _remote(file, data) if file.is_url else None
    head = _head(Path(file.name)) if remote is None else remote.read(0, min(HEAD_BYTES, remote.size))
    layout = layout_of(file.shown, head, dtype, header=data.token_header, flags=flags)
    found: TokenFile = (
        LocalTokenFile(Path(file.name), file.identity, layout, files)
        if remote is None
        else RemoteTokenFile(file.name, file.identity, layout, remote)
    )
    if sidecar is not None:
        check_end(sidecar.eos_id, f"the sidecar of {file.shown}", vocab_size)
        if sidecar.tokens != found.tokens:
            raise UserError(
                f"{file.shown} holds {found.tokens:,} ids, and {sidecar.tokens:,} by its sidecar: it is cut short or"
                f" changed: copy it again, or {FIX}"
            )
    check_head(file.shown, head, layout, vocab_size)
    return found, sidecar


def _remote(file: TokenName, data: DataConfig) -> Remote:
    cache = cache_folder(data.token_cache)
    served = file.served or look_up([file.name], cache)[file.name]
    return open_remote(file.name, cache, served.version)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            return handle.read(HEAD_BYTES)
    except OSError as error:
        raise unreadable(path, error) from error


def sidecar_of(file: TokenName) -> Sidecar | None:
    """The sidecar beside a file or a URL; None without one. That of a URL whose server was asked before is without its
    spans. Raises UserError for one that is damaged."""
    if file.served is not None:
        return file.served.sidecar
    return fetch_sidecar(file.name) if file.is_url else read_sidecar(Path(file.name))


def sidecars_of(loader: WindowLoader) -> dict[str, Sidecar | None]:
    """The sidecar of each file of a loader, by the file's name."""
    files = [file for source in loader.sources for file in source.files]
    fetched = fetch_sidecars(file.url for file in files if isinstance(file, RemoteTokenFile))
    return {
        file.name: fetched[file.url] if isinstance(file, RemoteTokenFile) else read_sidecar(Path(file.name))
        for file in files
    }


def dtype_of(name: str, sidecar: Sidecar | None, data: DataConfig, vocab_size: int, flags: Flags = RUN_FLAGS) -> str:
    """The dtype of a raw file: what the flag, the sidecar or the size of the vocabulary says, in this order."""
    if data.token_dtype != "auto":
        if sidecar is not None and sidecar.dtype != data.token_dtype:
            raise UserError(
                f"{name} holds {sidecar.dtype} by its sidecar, not {data.token_dtype}: leave out {flags.dtype}"
            )
        return data.token_dtype
    if sidecar is not None:
        return sidecar.dtype
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def check_end(eos_id: int | None, where: str, vocab_size: int) -> None:
    """Raises UserError for an end-of-document id, which `where` gives, that the model does not have."""
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise UserError(
            f"{where} ends documents with id {eos_id}, beyond the model's vocabulary of {vocab_size}: give the files"
            " and the id of the tokenizer that the model was made for"
        )


def eos_of(files: Sequence[tuple[TokenFile, Sidecar | None]], data: DataConfig, vocab_size: int) -> int:
    """The id that ends documents: what the flag, the sidecars or, where there are none, the tokenizer says. Raises
    UserError."""
    if data.eos_id is not None:
        check_end(data.eos_id, "--data.eos-id", vocab_size)
        return data.eos_id
    found = {None if sidecar is None else sidecar.eos_id: file.name for file, sidecar in files}
    if len(found) > 1:
        (one, first), (other, second), *_ = sorted(found.items(), key=lambda item: item[0] is None)
        if other is None:
            raise UserError(
                f"{first} ends documents with id {one} by its sidecar, and {second} has none: give --data.eos-id"
            )
        raise UserError(f"{first} ends documents with id {one}, {second} with {other}: give files of one tokenizer")
    (stated,) = found
    if stated is not None:
        return stated
    end = run_tokenizer(data, vocab_size, {}, fix="give --data.eos-id, or --data.tokenizer").eos_id
    check_end(end, f"--data.tokenizer {data.tokenizer}", vocab_size)
    return end


def _fingerprint(
    listed: Sequence[TokenSource],
    sources: Sequence[Windows],
    data: DataConfig,
    topology: Topology,
    *,
    held_out: bool,
    eos_id: int | None,
) -> dict[str, Any]:
    """What a resume compares: the files by name, size and content, and what decides how they are read."""
    numbered: dict[str, Any] = {}
    _fetch_samples([file for windows in sources for file in windows.files], topology.rank / topology.world)
    for number, windows in enumerate(sources, start=1):
        files = windows.files
        numbered[f"source {number}"] = {
            "files": len(files),
            "tokens": sum(file.tokens for file in files),
            "dtype": ", ".join(sorted({file.layout.dtype for file in files})),
            "digest": hash_contents(
                [(file.identity, file) for file in files], samples=any(file.is_remote for file in files)
            ),
        }
    ratios = [str(source.ratio) for source in listed]
    return {
        "source": {"ratios": ratios, **numbered},
        "holdout": None if data.held_out_tokens else data.holdout,
        "held_out": held_out,
        "eos_id": eos_id,
    }


def _fetch_samples(files: Sequence[TokenFile], begin: float) -> None:
    """Begins to fetch what the fingerprint reads of files behind URLs, from the share `begin` of them on: ranks of one
    machine have what they fetch in common, so they begin at different files."""
    remote = [file for file in files if isinstance(file, RemoteTokenFile)]
    first = int(len(remote) * begin)
    for file in (*remote[first:], *remote[:first]):
        for start, count in places_read(file.size, samples=True):
            file.content_ahead(start, count)
