"""Texts that a model has read, and reading more of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import UserError
from pipeline.inference.incremental_text import BEFORE
from pipeline.lm.decoding import Decoder, DecodingState

NONE = -1
"""In `Texts.last`: no token."""


@dataclass(frozen=True)
class Texts:
    """Texts that a model has read, a row each. Nothing here changes one: what goes on from it goes on from a copy."""

    state: DecodingState
    logits: Tensor
    """Behind the last token of each, [rows, vocabulary]."""
    last: Tensor
    """The last tokens of each, [rows, BEFORE] int64 on the CPU, NONE before the first."""

    @property
    def rows(self) -> int:
        return self.state.rows

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [int(length) for length in self.state.lengths]


def decoder_of(model: Any) -> Decoder:
    """What decodes with a model that `load` gave, or any causal language model of transformers. Raises UserError for a
    model that cannot be decoded."""
    if isinstance(model, Decoder):
        return model
    # A part of the model may have the name.
    if inspect.ismethod(getattr(model, "decoder", None)):
        found: Decoder = model.decoder()
        return found
    from pipeline.lm.dense_decoder import DenseDecoder

    return DenseDecoder(model)


def read(
    model: Any,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    state: Texts | None = None,
    *,
    writes: bool = False,
) -> Texts:
    """Reads prompts, each a row of its own. No special token is added: the end of a prompt is not the end of its text.

    `state`: each prompt goes on from its only row, or each from a row of its own; one prompt goes on from every row. It
    stays as it is. `writes`: there has to be room for a token that follows. Raises UserError for a prompt that is empty
    or no text, or longer than what the model takes.
    """
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    names = ["the prompt"] if len(given) == 1 else [f"prompt {number}" for number in range(1, len(given) + 1)]
    if not given:
        raise UserError("there is no prompt: give one or more")
    for name, text in zip(names, given, strict=True):
        check_prompt(text, name)
    decoder = decoder_of(model)
    every = [_ids(tokenizer, text, name, decoder) for name, text in zip(names, given, strict=True)]
    if state is not None:
        if len(every) == 1:
            every, names = every * state.rows, names * state.rows
        elif state.rows not in (1, len(every)):
            raise UserError(
                f"the state is of {state.rows} texts, and there are {len(every)} prompts: give one prompt, or as many"
            )
    for row, (ids, name) in enumerate(zip(every, names, strict=True)):
        before = 0 if state is None else state.lengths[row if state.rows > 1 else 0]
        check_room(decoder, len(ids), name, before)
        if writes:
            check_room(decoder, len(ids) + 1, f"{name} with one token more", before)
    return joined(decoder, [_read(decoder, ids, state, row) for row, ids in enumerate(every)])


def joined(decoder: Decoder, parts: Sequence[Texts]) -> Texts:
    """One of all their rows."""
    if len(parts) == 1:
        return parts[0]
    return Texts(
        decoder.join([part.state for part in parts]),
        torch.cat([part.logits for part in parts]),
        torch.cat([part.last for part in parts]),
    )


def copied(decoder: Decoder, texts: Texts, rows: Sequence[int]) -> Texts:
    """Copies of some of the rows."""
    index = torch.tensor(rows, dtype=torch.int64)
    logits = texts.logits[index.to(texts.logits.device)]
    return Texts(decoder.select(texts.state, index), logits, texts.last[index])


def check_prompt(text: str, name: str) -> None:
    """Raises UserError, which begins with `name`, for a prompt that is empty or no text."""
    if not isinstance(text, str):
        raise UserError(f"{name} is of the type {type(text).__name__}: give text")
    if not text:
        raise UserError(f"{name} is empty: give some text to go on with")
    if "\0" in text:
        raise UserError(f"{name} is binary, it holds the byte 0: give text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not UTF-8 (character {error.start}): give text in UTF-8") from None


def check_room(decoder: Decoder, tokens: int, name: str, before: int = 0) -> None:
    """Raises UserError, which begins with `name`, for more tokens, behind those before them, than a model takes."""
    if decoder.limit is not None and before + tokens > decoder.limit:
        behind = f" behind the {before} of the state" if before else ""
        raise UserError(f"{name} has {tokens} tokens{behind}, the model takes {decoder.limit}: shorten it")


def _ids(tokenizer: Tokenizer, text: str, name: str, decoder: Decoder) -> Tensor:
    """[tokens] int64."""
    ids = torch.from_numpy(tokenizer.encode(text))
    if not len(ids):
        raise UserError(f"{name} has no token in the tokenizer {tokenizer.name}: give other text")
    if int(ids.max()) >= decoder.vocab_size:
        raise UserError(
            f"{name}: the tokenizer {tokenizer.name} gives the token {int(ids.max())}, the model has"
            f" {decoder.vocab_size}: give its own with --tokenizer"
        )
    return ids


def _read(decoder: Decoder, ids: Tensor, state: Texts | None, row: int) -> Texts:
    """One text [tokens], from the start or from a row of a state."""
    before = None if state is None else copied(decoder, state, [row if state.rows > 1 else 0])
    rows = decoder.empty(1) if before is None else before.state
    logits = decoder.read(ids.unsqueeze(0), rows)
    last = torch.full((1, BEFORE), NONE) if before is None else before.last
    return Texts(rows, logits.clone(), torch.cat([last, ids.unsqueeze(0)], dim=1)[:, -BEFORE:].clone())
