"""From a run's configuration to its documents, and to a loader of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import RunConfig
from pipeline.data.build import build_source
from pipeline.data.packing import DocumentEncoder
from pipeline.data.sources.base import Source
from pipeline.data.sources.listing import list_files
from pipeline.data.sources.local import LocalFiles
from pipeline.data.tokenizer import Tokenizer, load_tokenizer
from pipeline.errors import UserError
from pipeline.files.home import expanded
from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.data.cache import Cached, cache_path, fingerprint_of, read_cache, write_cache
from pipeline.systems.cvfp.data.chats import MESSAGES, Conversations
from pipeline.systems.cvfp.data.embedding import rows_of_embedding
from pipeline.systems.cvfp.data.loader import PassLoader
from pipeline.systems.cvfp.data.split import split, without
from pipeline.systems.cvfp.data.texts import LEAST, read_cut
from pipeline.systems.cvfp.documents import DocumentSet

logger = logging.getLogger(__name__)


def list_documents(config: RunConfig) -> DocumentSet:
    """The documents that the `data` section names, tokenised, cut to rows and split; from the cache where it has those
    of these settings and of this content. A cache of other content is renewed, and a data set of the hub that cannot be
    reached is read from the cache; either is logged. Raises UserError."""
    assert isinstance(config.model, CvfpConfig)
    data, sizes = config.data, config.model
    for flag, given in (("--data.mix", data.mix), ("--data.tokens", data.tokens), ("--data.recall", data.recall)):
        if given:
            raise UserError(f"{flag}: this system reads whole documents: give --data.path or --data.dataset")
    if config.sequence_length < LEAST:
        raise UserError(
            f"--sequence-length {config.sequence_length}: a row needs {LEAST} tokens, one of them to be predicted: give"
            f" {LEAST} or more"
        )
    tokenizer = load_tokenizer(data.tokenizer, data.trust_remote_code)
    vocab = rows_of_embedding(sizes, tokenizer)
    settings = _settings(config, tokenizer, vocab)
    path = cache_path(expanded(sizes.data_cache), document_name(config), settings)
    try:
        cached = read_cache(path, settings)
    except ValueError as error:
        logger.warning("%s %s: the documents are tokenised again, and it is replaced", path, error)
        cached = None
    validation = _validation_source(config)
    try:
        source = _source(config)
    except UserError as error:
        if cached is None or data.dataset is None or expanded(data.dataset).exists():
            raise
        logger.warning("%s; the documents in %s, of an earlier run, are read", error, path)
        return cached.documents
    content = [source.fingerprint(), None if validation is None else validation.fingerprint()]
    if _is_of(cached, content):
        assert cached is not None
        return cached.documents
    if cached is not None:
        logger.warning("%s: the data has changed since: the documents are tokenised again, and it is replaced", path)
    found = _tokenised(config, source, validation, tokenizer, vocab)
    write_cache(path, found, settings, content)
    return found


def _is_of(cached: Cached | None, content: Any) -> bool:
    return cached is not None and cached.source == content


def document_name(config: RunConfig) -> str:
    """Name, number and length, as the cache's file has them."""
    assert isinstance(config.model, CvfpConfig)
    named = config.data.dataset or "_".join(Path(path).name for path in config.data.path) or "stdlib"
    # A pattern may hold what no file's name does.
    plain = "".join(letter if letter.isalnum() or letter in "-._@" else "_" for letter in named.rpartition("/")[2])
    samples = "all" if config.model.num_samples is None else config.model.num_samples
    return f"{plain[:80]}_{samples}samples_{config.sequence_length}len"


def _settings(config: RunConfig, tokenizer: Tokenizer, vocab: int) -> dict[str, Any]:
    """All that decides the documents but the content of their source."""
    assert isinstance(config.model, CvfpConfig)
    data = config.data
    return {
        "path": list(data.path),
        "dataset": [data.dataset, data.dataset_config, data.split],
        "text_field": data.text_field,
        "samples": config.model.num_samples,
        "length": config.sequence_length,
        "tokenizer": tokenizer.fingerprint,
        "vocab": vocab,
        "holdout": data.holdout,
        "min_tokens": data.min_tokens,
        "skip": data.on_bad_record == "skip",
        "validation": list(config.evaluation.path),
    }


def _source(config: RunConfig) -> Source:
    data = config.data
    if data.dataset in (None, "stdlib") or data.text_field != MESSAGES:
        return build_source(config)
    return Conversations(
        data.dataset,
        config_name=data.dataset_config,
        split=data.split,
        text_field=MESSAGES,
        skip=data.on_bad_record == "skip",
    )


def _validation_source(config: RunConfig) -> Source | None:
    """The files of `--evaluation.path`, PATH or NAME=PATH each; None where none is given. Raises UserError."""
    data = config.data
    if not config.evaluation.path:
        return None
    places = [
        entry if expanded(entry).exists() else entry.partition("=")[2] or entry for entry in config.evaluation.path
    ]
    listing = list_files(places, config.output_dir, flag="--evaluation.path")
    field = "text" if data.text_field == MESSAGES else data.text_field
    return LocalFiles(listing, text_field=field, skip=data.on_bad_record == "skip")


def _tokenised(
    config: RunConfig, source: Source, validation: Source | None, tokenizer: Tokenizer, vocab: int
) -> DocumentSet:
    assert isinstance(config.model, CvfpConfig)
    data, length, name = config.data, config.sequence_length, document_name(config)
    encode = DocumentEncoder(tokenizer, min_tokens=data.min_tokens, vocab_size=vocab)
    skip = data.on_bad_record == "skip"
    cut = read_cut(source, encode, length, config.model.num_samples, skip=skip)
    notes = list(cut.notes)
    if validation is None:
        training, held_out = split(cut, data.holdout, name)
    else:
        training, others = cut.rows, read_cut(validation, encode, length, None, skip=skip)
        held_out = others.rows
        notes += [f"validation: {note}" for note in others.notes]
        if not held_out:
            raise UserError(f"--evaluation.path holds no document of {LEAST} tokens or more: give another file")
    every = training
    training = without(every, held_out)
    if len(training) < len(every):
        notes.append(f"{len(every) - len(training):,} rows left out, as the same tokens are held out")
    if not training:
        raise UserError(f"{name}: no row is left to train on that is not held out too: give other documents")
    rows = training + held_out
    tokens, ends = np.concatenate(rows), np.cumsum([len(row) for row in rows], dtype=np.int64)
    fingerprint = fingerprint_of(tokens, ends, len(training), vocab, tokenizer.fingerprint)
    return DocumentSet(
        tokens, ends, len(training), vocab, name, fingerprint, tokenizer=tokenizer.fingerprint, notes=tuple(notes)
    )


def build_loader(
    config: RunConfig, topology: Topology, documents: DocumentSet, *, held_out: bool = False
) -> PassLoader:
    """Passes over the documents of one side of the hold-out, for this data rank, from their start.

    Held-out rows are those of `--evaluation.batch-size` where it is given, in the order of the data; a run that resumes
    on other ranks reads the same ones.
    """
    assert isinstance(config.model, CvfpConfig)
    rows = config.evaluation.batch_size if held_out else 0
    return PassLoader(
        documents,
        held_out=held_out,
        length=config.sequence_length,
        batch_size=rows or config.batch_size,
        grad_accum=1 if rows else config.grad_accum,
        data_rank=topology.data_rank,
        data_degree=topology.data,
        seed=config.seed,
        shuffle=config.data.shuffle and not held_out,
        stream=config.model.carry != "document",
        adjacent=config.model.adjacent,
    )
