"""From a run's configuration to its documents, and to a loader of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import RunConfig
from pipeline.data.build import build_source, list_data
from pipeline.data.sources.base import Order
from pipeline.data.tokenizer import Tokenizer, load_tokenizer
from pipeline.errors import UserError, brief
from pipeline.files.home import expanded
from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.data.cache import read_cache, write_cache
from pipeline.systems.cvfp.data.loader import PassLoader
from pipeline.systems.cvfp.documents import DocumentSet

MESSAGES = "messages"
"""The column of a chat data set: a list of messages, each with its `content`."""
LEAST = 2
"""Tokens of a document: a context and what it is to predict."""


def list_documents(config: RunConfig) -> DocumentSet:
    """The documents that the `data` section names, tokenised, truncated and split; from the cache where they are in it.
    Raises UserError."""
    assert isinstance(config.model, CvfpConfig)
    data, sizes = config.data, config.model
    for flag, given in (("--data.mix", data.mix), ("--data.tokens", data.tokens), ("--data.recall", data.recall)):
        if given:
            raise UserError(f"{flag}: this system reads whole documents: give --data.path or --data.dataset")
    tokenizer = load_tokenizer(data.tokenizer, data.trust_remote_code)
    if sizes.embedding is not None and tokenizer.vocab_size > sizes.vocab:
        raise UserError(
            f"--data.tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids and --model.embedding {sizes.embedding}"
            f" {sizes.vocab} rows: name the tokenizer of that model"
        )
    reader = _Chats(config) if _is_chat(config) else _Texts(config)
    key = {
        "source": reader.identity(),
        "samples": sizes.num_samples,
        "length": config.sequence_length,
        "tokenizer": tokenizer.fingerprint,
        "holdout": data.holdout,
        "validation": [reader_of_validation(path) for path in config.evaluation.path],
    }
    name = _name(config)
    fingerprint = blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    folder = expanded(sizes.data_cache)
    cached = read_cache(folder, name, fingerprint)
    if cached is not None:
        return cached
    found = _tokenised(config, reader, tokenizer, name, fingerprint)
    write_cache(folder, found)
    return found


def reader_of_validation(path: str) -> str:
    """The content of a file of validation documents, as a hash. Raises UserError."""
    file = expanded(path.partition("=")[2] or path)
    try:
        return blake2b(file.read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise UserError(f"--evaluation.path {path}: {error.strerror}: name a file of validation documents") from error


def _name(config: RunConfig) -> str:
    assert isinstance(config.model, CvfpConfig)
    source = config.data.dataset or "_".join(Path(path).name for path in config.data.path) or "stdlib"
    samples = "all" if config.model.num_samples is None else config.model.num_samples
    return f"{source.replace('/', '_')}_{samples}samples_{config.sequence_length}len"


def _is_chat(config: RunConfig) -> bool:
    return config.data.dataset not in (None, "stdlib") and config.data.text_field == MESSAGES


class _Texts:
    """Documents of files, or of a data set with a column of text."""

    def __init__(self, config: RunConfig) -> None:
        self.source = build_source(config, list_data(config))

    def identity(self) -> Any:
        return self.source.fingerprint()

    def texts(self) -> Iterator[str]:
        order = Order(streams=1, local_streams=range(1), held_out=False, holdout=0.0, shuffle=False, seed=0)
        for document in self.source.open(order).scan():
            if document.problem is None:
                yield document.text


class _Chats:
    """Conversations of a data set, the contents of their messages joined by newlines."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def identity(self) -> Any:
        data = self.config.data
        return {"dataset": data.dataset, "config": data.dataset_config, "split": data.split, "field": data.text_field}

    def texts(self) -> Iterator[str]:
        import datasets

        data = self.config.data
        path, _, revision = str(data.dataset).partition("@")
        try:
            rows = datasets.load_dataset(
                path, data.dataset_config, split=data.split, revision=revision or None, streaming=True
            )
            for row in rows:
                yield "\n".join(message["content"] for message in row[MESSAGES])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"--data.dataset {data.dataset}: its column {MESSAGES!r} is no list of messages: name a column of text"
                " with --data.text-field"
            ) from error
        except Exception as error:  # the library raises many kinds for a wrong name, split, and a dead network
            raise UserError(
                f"--data.dataset {data.dataset} (split {data.split!r}) cannot be read: {brief(error)}: check the name"
                " and the network, or give local documents with --data.path"
            ) from error


def _tokenised(
    config: RunConfig, reader: _Texts | _Chats, tokenizer: Tokenizer, name: str, fingerprint: str
) -> DocumentSet:
    assert isinstance(config.model, CvfpConfig)
    wanted, length = config.model.num_samples, config.sequence_length
    whole = [(_identity(text), tokenizer.encode(text)) for text in islice(reader.texts(), wanted)]
    pieces = [(identity, ids[:length]) for identity, ids in whole]
    if wanted is not None and len(whole) < wanted:
        # The later parts of long documents too, as far as needed; all of a document are on one side of the hold-out.
        later = (
            (identity, ids[start : start + length])
            for start in range(length, max((len(ids) for _, ids in whole), default=0), length)
            for identity, ids in whole
            if start < len(ids)
        )
        pieces += islice(later, wanted - len(pieces))
    pieces = [(identity, ids) for identity, ids in pieces if len(ids) >= LEAST]
    training, held_out = _split(pieces, config.data.holdout)
    if config.evaluation.path:
        # A file of their own: nothing of the training documents need be kept out.
        training, held_out = [ids for _, ids in pieces], list(_validation(config, tokenizer))
    for side, kept, fix in (
        ("train on", training, "a smaller --data.holdout"), ("hold out", held_out, "a larger --data.holdout"),
    ):  # fmt: skip
        if not kept:
            raise UserError(
                f"{name}: {len(pieces)} documents of {LEAST} tokens or more, and none to {side}: give more, or {fix}"
            )
    vocab = max(tokenizer.vocab_size, 1)
    every = training + held_out
    ids = np.concatenate(every).astype(np.uint32)
    return DocumentSet(
        ids, np.cumsum([len(part) for part in every], dtype=np.int64), len(training), vocab, name, fingerprint
    )


def _validation(config: RunConfig, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    for path in config.evaluation.path:
        file = expanded(path.partition("=")[2] or path)
        for paragraph in file.read_text().split("\n\n"):
            ids = tokenizer.encode(paragraph)[: config.sequence_length]
            if len(ids) >= LEAST:
                yield ids


def _identity(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _split(pieces: list[tuple[bytes, np.ndarray]], holdout: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Those to train on, and at least one document to hold out: the ones whose content has the lowest hashes."""
    identities = sorted({identity for identity, _ in pieces})
    held = set(identities[: max(1, round(holdout * len(identities)))]) if len(identities) > 1 else set()
    training = [ids for identity, ids in pieces if identity not in held]
    return training, [ids for identity, ids in pieces if identity in held]


def build_loader(
    config: RunConfig, topology: Topology, documents: DocumentSet, *, held_out: bool = False
) -> PassLoader:
    """Passes over the documents of one side of the hold-out, for this data rank, from their start."""
    assert isinstance(config.model, CvfpConfig)
    return PassLoader(
        documents,
        held_out=held_out,
        length=config.sequence_length,
        batch_size=config.batch_size,
        grad_accum=config.grad_accum,
        data_rank=topology.data_rank,
        data_degree=topology.data,
        seed=config.seed,
        stream=config.model.carry != "document",
    )
