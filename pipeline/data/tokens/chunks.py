"""Documents to ids, a chunk at a time: the part of `data prepare` that runs in many processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context

import numpy as np

from pipeline.data.sources.base import Document
from pipeline.data.sources.local import GROUPED, LocalFiles
from pipeline.data.tokenizer import Tokenizer, load_tokenizer
from pipeline.data.tokens.files import DTYPES
from pipeline.data.tokens.sidecar import Span
from pipeline.errors import UserError

CHUNK_BYTES = 1 << 20
"""Text of a chunk, about. What a token file holds depends on it, so it is fixed."""
IN_FLIGHT = 4
"""Chunks per process that are under way: so many are in memory."""


@dataclass(frozen=True)
class Job:
    """What a process needs to tokenise any chunk of a corpus."""

    source: LocalFiles
    tokenizer: str
    trust_remote_code: bool
    dtype: str


@dataclass
class Chunk:
    """Ids of consecutive documents, each with its end-of-document id, and what was found in them."""

    ids: np.ndarray
    spans: list[Span] = field(default_factory=list)
    empty: int = 0
    problems: list[Document] = field(default_factory=list)
    """Records that are no documents, or none that can be told from the next."""
    undecodable: list[Document] = field(default_factory=list)
    """Documents, without their text, of which bytes are read as U+FFFD."""


def cut(source: LocalFiles, limit: int = CHUNK_BYTES) -> list[range]:
    """Consecutive documents of about `limit` bytes, as ranges of their numbers; what is read in groups, by the group.

    A function of the files alone.
    """
    ends: list[int] = []
    filled, base = 0.0, 0
    for file, reader in source.readers():
        if isinstance(reader, GROUPED):
            ends += [base, *(base + np.cumsum(reader.group_rows)).tolist()]
            filled = 0.0
        else:
            each = max(file.path.stat().st_size / reader.rows, 1e-9)
            done = 0
            while done < reader.rows:
                room = max(1, int((limit - filled) / each))
                taken = min(room, reader.rows - done)
                done += taken
                filled += taken * each
                if taken == room:
                    ends.append(base + done)
                    filled = 0.0
        base += reader.rows
    starts = sorted({0, *ends, base})
    return [range(start, stop) for start, stop in pairwise(starts)]


def encode(source: LocalFiles, tokenizer: Tokenizer, dtype: str, documents: range) -> Chunk:
    """Tokenises documents by their numbers. One that has the end-of-document id inside is a problem."""
    found = Chunk(np.empty(0, DTYPES[dtype]))
    texts: list[str] = []
    names: list[str] = []
    places: list[int] = []
    for number in documents:
        document = source[number]
        if document.problem is not None:
            found.problems.append(Document(document.name, "", document.problem))
            continue
        if document.undecodable:
            found.undecodable.append(Document(document.name, "", undecodable=True))
        if not document.text:
            found.empty += 1
            continue
        texts.append(document.text)
        names.append(document.name)
        places.append(number)
    parts: list[np.ndarray] = []
    counts: dict[str, list[int]] = {}
    for name, number, ids in zip(names, places, tokenizer.encode_batch(texts), strict=True):
        if not len(ids):
            found.empty += 1
            continue
        if (ids == tokenizer.eos_id).any():
            problem = f"{name} has the end-of-document id {tokenizer.eos_id} in its text, by {tokenizer.name}"
            found.problems.append(Document(name, "", problem))
            continue
        parts += [ids.astype(DTYPES[dtype]), np.array([tokenizer.eos_id], DTYPES[dtype])]
        count = counts.setdefault(source.identity(number), [0, 0])
        count[0] += 1
        count[1] += len(ids) + 1
    found.spans = [Span(name, documents, tokens) for name, (documents, tokens) in counts.items()]
    found.ids = np.concatenate(parts) if parts else found.ids
    return found


def encode_all(job: Job, chunks: Sequence[range], workers: int) -> Iterator[Chunk]:
    """The chunks in their order, made by so many processes; one: by this one. Raises UserError."""
    if workers == 1:
        tokenizer = load_tokenizer(job.tokenizer, job.trust_remote_code)
        for chunk in chunks:
            yield encode(job.source, tokenizer, job.dtype, chunk)
        return
    # Not forked: the threads of the libraries here would not be there.
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (job,)) as pool:
        pending: list[Future[Chunk]] = []
        waiting = iter(chunks)
        try:
            for chunk in waiting:
                pending.append(pool.submit(_work, chunk))
                if len(pending) >= IN_FLIGHT * workers:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process of data prepare was ended from outside, perhaps for want of memory: give fewer --workers"
                " (the same command goes on)"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_work_of_this_process: list[tuple[Job, Tokenizer]] = []


def _begin(job: Job) -> None:
    """In a new process: its tokenizer, which takes no further threads."""
    # The parent ends by it, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work_of_this_process.append((job, load_tokenizer(job.tokenizer, job.trust_remote_code)))


def _work(documents: range) -> Chunk:
    job, tokenizer = _work_of_this_process[0]
    return encode(job.source, tokenizer, job.dtype, documents)
