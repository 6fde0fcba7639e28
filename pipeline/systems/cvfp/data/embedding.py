"""Whether the ids of a tokenizer are the rows of a given embedding."""

from __future__ import annotations

import logging

from pipeline.data.tokenizer import Tokenizer, load_tokenizer
from pipeline.errors import UserError, brief
from pipeline.files.given_path import expanded, is_path
from pipeline.parallel.weight_files import model_tensors
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.model.weights import NAMES

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")
"""How the files of tokenizers begin."""
PADDED_TO, UNUSED_SHARE = 64, 0.02
"""Rows that an embedding may have beyond the tokenizer's ids: fewer than the multiple that models pad it to, or such a
share of it (phi-2: 905 of 51,200). More, and the ids are those of another tokenizer."""


def rows_of_embedding(sizes: CvfpConfig, tokenizer: Tokenizer) -> int:
    """Rows of embedding and head: those of the given embedding, whose tokenizer this must be, else the tokenizer's ids.

    Of a name of the hub its config.json is read, and of either kind its tokenizer, where it has one. Raises UserError
    where they do not fit.
    """
    if sizes.embedding is None:
        return tokenizer.vocab_size
    flag, name = f"--model.embedding {sizes.embedding}", sizes.embedding
    rows, width = _shape(name, flag)
    if width != sizes.width:
        raise UserError(f"{flag}: its vectors have {width} dimensions and --model.width is {sizes.width}: give {width}")
    own = tokenizer if tokenizer.name == name else _own_tokenizer(name)
    fix = f"give --data.tokenizer {name}" if own is not None else "name the tokenizer of that model"
    if own is not None and own.fingerprint != tokenizer.fingerprint:
        raise UserError(f"--data.tokenizer {tokenizer.name} is not the tokenizer of {flag}: {fix}")
    if not 0 <= rows - tokenizer.vocab_size <= max(PADDED_TO - 1, UNUSED_SHARE * rows):
        raise UserError(
            f"--data.tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} ids and {flag} {rows:,} rows: {fix}"
        )
    return rows


def _shape(name: str, flag: str) -> tuple[int, int]:
    """Rows and width of the input embedding."""
    folder = expanded(name)
    if folder.is_dir():
        stored = model_tensors(folder)
        fitting = [tensor for key, tensor in stored.items() if key.endswith(NAMES)]
        if not fitting:
            raise UserError(f"{flag}: no input embedding among its tensors: name a decoder of transformers")
        rows, width = fitting[0].shape
        return rows, width
    if folder.exists() or is_path(name):
        raise UserError(f"{flag}: no folder of a model: give one, or a name of the Hugging Face hub")
    import transformers

    repository, _, revision = name.partition("@")
    try:
        found = transformers.AutoConfig.from_pretrained(repository, revision=revision or None, trust_remote_code=False)
        text = found.get_text_config()
        return int(text.vocab_size), int(text.hidden_size)
    except Exception as error:  # every kind of wrong name and dead network raises something else
        raise UserError(f"{flag}: its config.json cannot be read ({brief(error)}): give a local folder") from error


def _own_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer beside a model; None where there is none, or where it cannot be loaded, which is logged."""
    folder = expanded(name)
    if folder.is_dir() and not any(file.name.startswith(TOKENIZER_FILES) for file in folder.iterdir()):
        return None
    try:
        return load_tokenizer(name)
    except UserError as error:
        logger.warning(
            "--model.embedding %s: only the number of ids is compared with --data.tokenizer: %s", name, error
        )
        return None
