"""Bytes per token id, of what a run reads: for bits per byte."""

from __future__ import annotations

import logging

from torch import Tensor

from pipeline.data.build import Listings
from pipeline.data.run_tokenizer import UnknownTokenizerError, run_tokenizer
from pipeline.data.tokens.build import sidecar_of
from pipeline.data.tokens.listing import TokenListing, list_token_data
from pipeline.data.tokens.sidecar import makers_of
from pipeline.data_config import DataConfig

logger = logging.getLogger(__name__)


def byte_lengths_of(data: DataConfig, files: Listings | None, vocab_size: int) -> Tensor | None:
    """Bytes of text that each id stands for, [vocabulary of the tokenizer] int64; None where that is not known.

    Of token files it is known where the tokenizer that made those of evaluations can be loaded without a network:
    training needs none. `files`: what was listed of the data; None: this lists it. `vocab_size`: the model's. Raises
    UserError.
    """
    if data.recall is not None:
        return None
    makers: dict[str, str] = {}
    if data.tokens:
        listed = files if isinstance(files, TokenListing) else list_token_data(data)
        makers = makers_of(sidecar_of(file) for source in listed.evaluated for file in source.files)
    try:
        return run_tokenizer(data, vocab_size, makers, download=not data.tokens).byte_lengths()
    except UnknownTokenizerError as error:
        logger.warning("no bits per byte: %s", error)
        return None
