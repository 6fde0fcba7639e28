"""Text to token files: the same files whatever the number of processes, each written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.records import RecordLog
from pipeline.data.tokenizer import Tokenizer
from pipeline.data.tokens.chunks import CHUNK_BYTES, Chunk, Job, cut, encode_all
from pipeline.data.tokens.files import DTYPES
from pipeline.data.tokens.sidecar import Sidecar, Span, read_sidecar, sidecar_path
from pipeline.errors import UserError
from pipeline.files.output import write_json, writing


@dataclass(frozen=True)
class Prepared:
    """One token file, and whether it was there already."""

    path: Path
    sidecar: Sidecar
    was_there: bool


def prepare(
    job: Job,
    tokenizer: Tokenizer,
    out: Path,
    log: RecordLog,
    *,
    workers: int,
    file_bytes: int,
    report: Callable[[Prepared], None],
) -> None:
    """Writes the token files of a corpus to a folder, `file_bytes` of text each, about.

    A document is whole in one file. Files that an earlier call with the same settings has written stay, so that a call
    that was stopped goes on. Raises UserError where the folder holds files of other settings.
    """
    chunks = cut(job.source)
    per_file = max(1, file_bytes // CHUNK_BYTES)
    groups = [chunks[start : start + per_file] for start in range(0, len(chunks), per_file)]
    digits = max(5, len(str(len(groups))))
    paths = [out / f"part-{number:0{digits}d}.npy" for number in range(len(groups))]
    _refuse_strangers(out, paths)
    settings = [_settings(job, group) for group in groups]
    done = {path: _finished(path, wanted, tokenizer, job.dtype) for path, wanted in zip(paths, settings, strict=True)}
    missing = [number for number, path in enumerate(paths) if done[path] is None]
    to_do = [chunk for number in missing for chunk in groups[number]]
    encoded = encode_all(job, to_do, min(workers, max(1, len(to_do))))
    for number, path in enumerate(paths):
        there = done[path]
        if there is None:
            parts = (next(encoded) for _ in groups[number])
            sidecar = _write(path, parts, tokenizer, job.dtype, settings[number], log)
            report(Prepared(path, sidecar, was_there=False))
        else:
            report(Prepared(path, there, was_there=True))
    # Ends its processes.
    for _ in encoded:
        raise AssertionError("every chunk belongs to a file")


def _settings(job: Job, chunks: Sequence[range]) -> dict[str, Any]:
    """What decides the content of a file beside tokenizer and dtype."""
    return {"corpus": job.source.fingerprint(), "documents": [chunks[0].start, chunks[-1].stop]}


def _refuse_strangers(out: Path, paths: Sequence[Path]) -> None:
    known = set(paths)
    other = next((path for path in sorted(out.glob("part-*.npy")) if path not in known), None)
    if other is not None:
        raise UserError(f"--out {out} holds {other.name} of another corpus or file size: name another folder")


def _finished(path: Path, settings: dict[str, Any], tokenizer: Tokenizer, dtype: str) -> Sidecar | None:
    """The sidecar of a file that is there already; None where it has yet to be written."""
    found = read_sidecar(path)
    if found is None:
        return None
    same = found.settings == settings and found.tokenizer_fingerprint == tokenizer.fingerprint and found.dtype == dtype
    if not same:
        raise UserError(
            f"--out {path.parent} holds {path.name} of another corpus, tokenizer or dtype: name another folder"
        )
    whole = path.is_file() and path.stat().st_size == found.tokens * DTYPES[dtype].itemsize
    return found if whole else None


def _write(
    path: Path, chunks: Any, tokenizer: Tokenizer, dtype: str, settings: dict[str, Any], log: RecordLog
) -> Sidecar:
    """The token file, and then its sidecar: a file without one is not whole."""
    partial = path.with_name(f".{path.name}.partial")
    state, tokens, spans = hashlib.sha256(), 0, []
    try:
        with writing(path):
            sidecar_path(path).unlink(missing_ok=True)
            with partial.open("wb") as file:
                for chunk in chunks:
                    _note(chunk, log)
                    content = chunk.ids.tobytes()
                    state.update(content)
                    file.write(content)
                    tokens += len(chunk.ids)
                    spans += chunk.spans
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    joined = _joined(spans)
    sidecar = Sidecar(
        dtype=dtype,
        tokens=tokens,
        documents=sum(span.documents for span in joined),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        sha256=state.hexdigest(),
        spans=joined,
        settings=settings,
    )
    with writing(sidecar_path(path)):
        write_json(sidecar_path(path), sidecar.to_json())
    return sidecar


def _note(chunk: Chunk, log: RecordLog) -> None:
    for document in chunk.problems:
        log.refuse_or_skip(document)
    for document in chunk.undecodable:
        log.note(document)


def _joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Spans of one source file that follow each other as one."""
    found: list[Span] = []
    for span in spans:
        if found and found[-1].source == span.source:
            last = found.pop()
            span = Span(span.source, last.documents + span.documents, last.tokens + span.tokens)
        found.append(span)
    return tuple(found)
