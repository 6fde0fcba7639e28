"""From a run's configuration to its loader."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.data.batch import StatefulLoader, TokenBatch
from pipeline.data.loader import PackedLoader
from pipeline.data.long_recall import LongRecallLoader
from pipeline.data.sources.base import Source
from pipeline.data.sources.listing import Listing, file_format, list_files
from pipeline.data.synthetic import RecallLoader
from pipeline.data.tokenizer import Tokenizer, load_tokenizer
from pipeline.data.tokens.listing import TokenListing, list_token_data
from pipeline.data_config import DataConfig, mix_weights
from pipeline.errors import UserError
from pipeline.files.given_path import expanded, is_path

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.parallel.topology import Topology


Listings = tuple[Listing | None, ...] | TokenListing
"""What was listed of each source of a configuration, None for one that is no files; or its token files."""


def list_data(config: RunConfig, *, ask_servers: bool = False) -> Listings:
    """The files that `--data.path`, `--data.mix` or `--data.tokens` names, as this process sees them; with
    `ask_servers`, also what is said of URLs. Raises UserError."""
    if config.data.tokens:
        return list_token_data(config.data, ask_servers=ask_servers)
    if not config.data.mix:
        return (list_files(config.data.path, config.output_dir) if config.data.path else None,)
    listings: list[Listing | None] = []
    for name in mix_weights(config.data.mix):
        with _of_mixture(name):
            listings.append(list_files((name,), config.output_dir) if _names_files(name) else None)
    return tuple(listings)


def _names_files(name: str) -> bool:
    """Whether a source of a mixture is a file, a folder or a pattern; if not, it is a data set."""
    return is_path(name) or glob.has_magic(name) or file_format(name) is not None or expanded(name).exists()


@contextlib.contextmanager
def _of_mixture(name: str) -> Iterator[None]:
    """An error in one source of a mixture says that it is one: its message names the flag of a single source."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--data.mix {name}: {error}") from error


def build_source(config: RunConfig, files: Listings | None = None) -> Source:
    """The corpus that a configuration names; the Python standard library when it names none.

    `files` is what another process has listed for all; without, this one lists them.
    """
    data = config.data
    if data.tokens:
        raise UserError("--data.tokens names token files, where documents are read: give --data.path or --data.dataset")
    listings = list_data(config) if files is None else files
    assert not isinstance(listings, TokenListing)
    if not data.mix:
        return _build_one(data, listings[0])
    from pipeline.data.sources.mixed import MixedSource

    weights = mix_weights(data.mix)
    sources = {}
    for name, listing in zip(weights, listings, strict=True):
        with _of_mixture(name):
            sources[name] = _build_one(dataclasses.replace(data, mix=(), dataset=name), listing)
    return MixedSource(sources, list(weights.values()))


def _build_one(data: DataConfig, files: Listing | None) -> Source:
    """The files that are listed, or the data set that `data` names where there are none."""
    skip = data.on_bad_record == "skip"
    if files is not None:
        from pipeline.data.sources.local import LocalFiles

        return LocalFiles(files, text_field=data.text_field, skip=skip)
    if data.dataset is None or data.dataset == "stdlib":
        from pipeline.data.sources.local import standard_library

        return standard_library()
    from pipeline.data.sources.huggingface import HuggingFaceStream

    if data.shuffle_buffer < 1:
        raise UserError(f"--data.shuffle-buffer is {data.shuffle_buffer}: give 1 or more")
    return HuggingFaceStream(
        data.dataset,
        config_name=data.dataset_config,
        split=data.split,
        text_field=data.text_field,
        shuffle_buffer=data.shuffle_buffer,
        skip=skip,
    )


def build_loader(
    config: RunConfig,
    topology: Topology,
    *,
    vocab_size: int,
    held_out: bool = False,
    files: Listings | None = None,
    source: Source | None = None,
    tokenizer: Tokenizer | None = None,
    whole: bool = False,
) -> StatefulLoader[TokenBatch]:
    """The loader of this data rank: of documents, of token files, or of the recall task, as the configuration has it.

    `vocab_size` is the model's: a token id beyond it is refused. `files` are as in `build_source`; training and
    held-out loader may share a `source`, which is then indexed once. Raises UserError.

    The held-out loader reads in an order that no seed changes; `reset()` it before each evaluation. Unless
    `--evaluation.batch-size` sets its rows, they are those of training, and a run that resumes on other ranks evaluates
    the same text. `whole`: a held-out loader of all documents of the configuration, none of which is for training.
    """
    data, rows = config.data, config.evaluation.batch_size if held_out else 0
    if data.recall is not None:
        if data.recall.vocab_size > vocab_size:
            raise UserError(
                f"--data.recall: the task has {data.recall.vocab_size} token ids and the model {vocab_size}: give fewer"
                " keys, values and fillers, or the model a larger vocabulary"
            )
        kind = LongRecallLoader if data.recall.spread == "log" else RecallLoader
        return kind(
            data.recall,
            sequence_length=config.sequence_length,
            batch_size=rows or config.batch_size,
            grad_accum=1 if held_out else config.grad_accum,
            data_rank=topology.data_rank,
            data_degree=topology.data,
            seed=config.seed,
            held_out=held_out,
        )
    if data.tokens:
        from pipeline.data.tokens.build import build_window_loader

        listed = list_data(config) if files is None else files
        assert isinstance(listed, TokenListing)
        return build_window_loader(config, topology, listed, vocab_size=vocab_size, held_out=held_out)
    if data.held_out_tokens:
        raise UserError("--data.held-out-tokens is given without --data.tokens: name the files of training too")
    return PackedLoader(
        source or build_source(config, files),
        tokenizer or load_tokenizer(data.tokenizer, data.trust_remote_code),
        sequence_length=config.sequence_length,
        batch_size=rows or config.batch_size,
        grad_accum=1 if rows else config.grad_accum,
        data_rank=topology.data_rank,
        data_degree=topology.data,
        seed=0 if held_out else config.seed,
        vocab_size=vocab_size,
        # Where nothing is held out, all documents are on the other side.
        held_out=held_out and not whole,
        holdout=0.0 if whole else data.holdout,
        shuffle=data.shuffle,
        min_tokens=data.min_tokens,
        prefetch=not held_out,
        skip_bad_records=data.on_bad_record == "skip",
        accept_change=data.on_change == "accept",
        should_report=topology.sequence_rank == 0,
    )
