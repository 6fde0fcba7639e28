"""Text that goes on from what a model has read: `generate`, and `stream` for one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch

from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import UserError
from pipeline.inference.incremental_text import IncrementalText
from pipeline.inference.texts import NONE, Texts, check_room, copied, decoder_of, read
from pipeline.lm.decoding import Decoder
from pipeline.lm.sampling import Sampling

MAX_NEW_TOKENS = 128
Ended = Literal["eos", "length", "limit"]


class Token(NamedTuple):
    """One token of one row's text."""

    row: int
    """The index of its prompt, or of the state's row."""
    id: int
    text: str
    """What it adds to the row's text; empty while a character is not complete."""
    ended: Ended | None = None
    """Why it is the row's last: `eos`: it ends a document; `length`: as many were asked for; `limit`: the model takes
    no longer text."""


@overload
def generate(model: Any, tokenizer: Tokenizer, prompts: str, **options: Any) -> str: ...


@overload
def generate(model: Any, tokenizer: Tokenizer, prompts: Sequence[str] | None = None, **options: Any) -> list[str]: ...


def generate(
    model: Any, tokenizer: Tokenizer, prompts: str | Sequence[str] | None = None, **options: Any
) -> str | list[str]:
    """The text that follows a prompt, without it; of several prompts, which are decoded together, a list. Takes the
    options of `stream`, and raises as it does."""
    texts: dict[int, str] = {}
    state = options.get("state")
    for token in stream(model, tokenizer, prompts, **options):
        texts[token.row] = texts.get(token.row, "") + token.text
    rows = 1 if isinstance(prompts, str) else len(prompts) if prompts else 0
    if state is not None:
        rows = max(rows, state.rows)
    found = [texts.get(row, "") for row in range(rows)]
    return found[0] if isinstance(prompts, str) and rows == 1 else found


def stream(
    model: Any,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str] | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    state: Texts | None = None,
) -> Iterator[Token]:
    """The tokens that follow each prompt, as they are drawn: of several prompts one each in turn, until all have ended.

    `model`, `tokenizer`: as `load` gives them, or any causal language model of transformers, in evaluation mode.
    `state`: what was read before the prompts, as `read` takes it; without prompts each of its rows goes on. The options
    are those of `Sampling`; a row's text depends on its own prompt, its index among them and the seed, not on the other
    prompts. The prompts are read before this returns. Raises UserError as `read` and `Sampling` do.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    if max_new_tokens < 0:
        raise UserError(f"--max-new-tokens {max_new_tokens}: give 0 or more")
    decoder = decoder_of(model)
    if prompts is not None:
        texts = read(decoder, tokenizer, prompts, state, writes=max_new_tokens > 0)
    elif state is not None:
        texts = copied(decoder, state, range(state.rows))
    else:
        raise UserError("there is neither a prompt nor a state: give one of them")
    return tokens_after(decoder, tokenizer, texts, sampling, max_new_tokens)


def tokens_after(
    decoder: Decoder, tokenizer: Tokenizer, texts: Texts, sampling: Sampling, max_new_tokens: int
) -> Iterator[Token]:
    """The tokens that follow `texts`, whose state is used up. Raises UserError where there is no room for one."""
    if max_new_tokens:
        check_next(decoder, texts)
    return _tokens(decoder, tokenizer, texts, sampling, max_new_tokens)


def check_next(decoder: Decoder, texts: Texts) -> None:
    """Raises UserError for a text that has no room for one token more."""
    for number, length in enumerate(texts.lengths, 1):
        name = "the text" if texts.rows == 1 else f"text {number}"
        check_room(decoder, length + 1, f"{name} with one token more")


def _tokens(
    decoder: Decoder, tokenizer: Tokenizer, texts: Texts, sampling: Sampling, max_new_tokens: int
) -> Iterator[Token]:
    state, logits, active = texts.state, texts.logits, list(range(texts.rows))
    pieces = [IncrementalText(tokenizer, [int(i) for i in last if i != NONE]) for last in texts.last]
    for number in range(1, max_new_tokens + 1):
        lengths = [int(length) for length in state.lengths]
        # There may be rows of logits that stand for no token.
        ids = sampling.choose(logits[:, : tokenizer.vocab_size], active, lengths)
        ends: list[Ended | None] = []
        for row, length, token in zip(active, lengths, ids, strict=True):
            full = decoder.limit is not None and length + 1 >= decoder.limit
            ended: Ended | None = "eos" if token == tokenizer.eos_id else "limit" if full else None
            ended = ended or ("length" if number == max_new_tokens else None)
            text = "" if ended == "eos" else pieces[row].push(token)
            yield Token(row, token, text + (pieces[row].end() if ended else ""), ended)
            ends.append(ended)
        going_on = [place for place, ended in enumerate(ends) if ended is None]
        if not going_on:
            return
        if len(going_on) < len(active):
            state = decoder.select(state, torch.tensor(going_on))
            active, ids = ([x[place] for place in going_on] for x in (active, ids))
        logits = decoder.step(torch.tensor(ids, device=logits.device), state)
