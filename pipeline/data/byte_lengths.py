"""Bytes per token id, of what a run reads: for bits per byte."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from pipeline.data.build import Listings
from pipeline.data.tokenizer import Tokenizer, load_tokenizer
from pipeline.data.tokens.build import sidecar_of
from pipeline.data.tokens.listing import TokenListing, list_token_data
from pipeline.data_config import DataConfig

logger = logging.getLogger(__name__)


def byte_lengths_of(data: DataConfig, files: Listings | None, vocab_size: int) -> Tensor | None:
    """Bytes of text that each id stands for, [vocabulary of the tokenizer] int64; None where that is not known.

    Of token files it is known where the tokenizer that made them can be loaded without a network: training needs none.
    `files`: what was listed of the data; None: this lists it. `vocab_size`: the model's. Raises UserError.
    """
    if data.recall is not None:
        return None
    if not data.tokens:
        return load_tokenizer(data.tokenizer, data.trust_remote_code).byte_lengths()
    listed = files if isinstance(files, TokenListing) else list_token_data(data)
    tokenizer = _of_token_files(data, listed, vocab_size)
    return None if tokenizer is None else tokenizer.byte_lengths()


def _of_token_files(data: DataConfig, files: TokenListing, vocab_size: int) -> Tokenizer | None:
    """The tokenizer that made the files of evaluations; None where it is not known, or not here."""
    sidecars = [sidecar_of(file) for source in files.evaluated for file in source.files]
    known = {sidecar.tokenizer_fingerprint: sidecar.tokenizer for sidecar in sidecars if sidecar is not None}
    if not known:
        if not is_here(data.tokenizer):
            return None
        tokenizer = load_tokenizer(data.tokenizer, data.trust_remote_code)
        # Nobody has named a tokenizer: these are ids of another.
        return None if tokenizer.name == "bytes" and vocab_size > tokenizer.vocab_size else tokenizer
    if len(known) > 1 or None in sidecars:
        logger.warning("no bits per byte: the token files of evaluations were made with several tokenizers")
        return None
    ((fingerprint, name),) = known.items()
    for candidate in dict.fromkeys((data.tokenizer, name)):
        if is_here(candidate):
            tokenizer = load_tokenizer(candidate, data.trust_remote_code)
            if tokenizer.fingerprint == fingerprint:
                return tokenizer
    logger.warning(
        "no bits per byte: the tokenizer of the token files, %s, is not here: name it with --data.tokenizer", name
    )
    return None


def is_here(name: str) -> bool:
    """Whether a tokenizer can be loaded without a network: all but names on the Hub that are not in its cache."""
    if name == "bytes" or Path(name).expanduser().exists():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = name.partition("@")
    try:
        return isinstance(try_to_load_from_cache(repository, "tokenizer.json", revision=revision or None), str)
    except HFValidationError:  # a path, of nothing
        return False
