"""From a run's configuration to its documents, and to a loader of them."""

from __future__ import annotations

import dataclasses
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
from pipeline.data_config import DataConfig
from pipeline.errors import UserError
from pipeline.files.given_path import expanded
from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.data.cache import cache_path, fingerprint_of, read_cache, write_cache
from pipeline.systems.cvfp.data.chats import MESSAGES, TEXT, Conversations
from pipeline.systems.cvfp.data.embedding import rows_of_embedding
from pipeline.systems.cvfp.data.loader import PassLoader
from pipeline.systems.cvfp.data.split import held_out_beside, split, without
from pipeline.systems.cvfp.data.texts import LEAST, read_cut
from pipeline.systems.cvfp.documents import DocumentSet

logger = logging.getLogger(__name__)

VERSION = 2
"""Of the rule by which documents are chosen, cut and held out: another one makes other files of the cache."""


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
    held_out = None if validation is None else validation.fingerprint()
    try:
        source = _source(config)
    except UserError as error:
        if cached is None or data.dataset is None or expanded(data.dataset).exists():
            raise
        if cached.source[1] != held_out:
            raise UserError(
                f"--evaluation.path has changed since the documents in {path} were tokenised, and {data.dataset} cannot"
                " be read to do it again: restore the file, or give the network back"
            ) from error
        logger.warning("%s; the documents in %s, of an earlier run, are read", error, path)
        return cached.documents
    content = [source.fingerprint(), held_out]
    if cached is not None and cached.source == content:
        return cached.documents
    if cached is not None:
        logger.warning("%s: the data has changed since: the documents are tokenised again, and it is replaced", path)
    found = _tokenised(config, source, validation, tokenizer, vocab)
    write_cache(path, found, settings, content)
    return found


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
        "version": VERSION,
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
    if _on_disk(data):
        return build_source(dataclasses.replace(config, data=dataclasses.replace(data, text_field=_text_field(data))))
    if data.text_field != MESSAGES:
        return build_source(config)
    assert data.dataset is not None
    return Conversations(
        data.dataset,
        config_name=data.dataset_config,
        split=data.split,
        text_field=MESSAGES,
        skip=data.on_bad_record == "skip",
    )


def _on_disk(data: DataConfig) -> bool:
    """Whether documents are read of files, in the order of their names, and not of a data set, in its own order."""
    return data.dataset in (None, "stdlib")


def _text_field(data: DataConfig) -> str:
    """Of the records of files, whose text is one string where a data set may have the messages of a conversation."""
    return TEXT if data.text_field == MESSAGES else data.text_field


def _validation_source(config: RunConfig) -> Source | None:
    """The files of `--evaluation.path`, PATH or NAME=PATH each; None where none is given. Raises UserError."""
    data = config.data
    if not config.evaluation.path:
        return None
    places = [
        entry if expanded(entry).exists() else entry.partition("=")[2] or entry for entry in config.evaluation.path
    ]
    listing = list_files(places, config.output_dir, flag="--evaluation.path")
    return LocalFiles(listing, text_field=_text_field(data), skip=data.on_bad_record == "skip")


def _tokenised(
    config: RunConfig, source: Source, validation: Source | None, tokenizer: Tokenizer, vocab: int
) -> DocumentSet:
    """Documents to train on, and those that are held out: of `validation` where it is given; else, of a number of
    documents that is asked for, those after them; else those that a hash says."""
    assert isinstance(config.model, CvfpConfig)
    data, length, name, wanted = config.data, config.sequence_length, document_name(config), config.model.num_samples
    encode = DocumentEncoder(tokenizer, min_tokens=data.min_tokens, vocab_size=vocab)
    skip = data.on_bad_record == "skip"
    beside = 0 if wanted is None or validation is not None else held_out_beside(wanted, data.holdout)
    every = None if wanted is None else wanted + beside
    # Of files the first ones by name are no sample of all: one folder, or one letter.
    cut = read_cut(source, encode, length, every, skip=skip, shuffle=every is not None and _on_disk(data))
    notes = list(cut.notes)
    if validation is not None:
        training, others = cut.rows, read_cut(validation, encode, length, None, skip=skip)
        held_out = others.rows
        notes += [f"validation: {note}" for note in others.notes]
        if not held_out:
            raise UserError(f"--evaluation.path holds no document of {LEAST} tokens or more: give another file")
    elif beside and len(set(cut.owners)) == every:
        training, held_out = cut.rows[:wanted], cut.rows[wanted:]
        kept = without(held_out, training)
        if len(kept) < len(held_out):
            notes.append(f"{len(held_out) - len(kept):,} held-out rows left out, as the same tokens are trained on")
        held_out = kept
        if not held_out:
            raise UserError(f"{name}: no row is left to hold out that is not trained on too: give other documents")
    else:
        training, held_out = split(cut, data.holdout, name)
    learnt = without(training, held_out)
    if len(learnt) < len(training):
        notes.append(f"{len(training) - len(learnt):,} rows left out, as the same tokens are held out")
    if not learnt:
        raise UserError(f"{name}: no row is left to train on that is not held out too: give other documents")
    rows = learnt + held_out
    tokens, ends = np.concatenate(rows), np.cumsum([len(row) for row in rows], dtype=np.int64)
    fingerprint = fingerprint_of(tokens, ends, len(learnt), vocab, tokenizer.fingerprint)
    return DocumentSet(
        tokens, ends, len(learnt), vocab, name, fingerprint, tokenizer=tokenizer.fingerprint, notes=tuple(notes)
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
