"""Greedy continuations of prompts, side by side, up to strings at which they stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pipeline.data.tokenizer import Tokenizer
from pipeline.lm.decoding import Decoder


class Prompt(NamedTuple):
    """A text to go on with."""

    ids: list[int]
    """At least one."""
    most: int
    """Tokens to add at most, at least one."""
    until: tuple[str, ...]
    """The text ends before the first of these in it."""


def prompt_room(decoder: Decoder, most: int) -> int | None:
    """Tokens of a prompt at the most, where `most` are to be added; None: any number."""
    return None if decoder.limit is None else decoder.limit - most


@torch.no_grad()
def continuations(decoder: Decoder, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[str]:
    """What the model is likeliest to go on with, token by token, without the prompts. It ends at the tokenizer's
    end-of-document token as well. Prompts that leave no room (`prompt_room`) lose their first tokens."""
    added: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return []
    states, first = [], []
    for prompt in prompts:
        room = prompt_room(decoder, prompt.most)
        ids = prompt.ids if room is None else prompt.ids[-room:]
        states.append(decoder.empty(1))
        first.append(decoder.read(torch.tensor([ids]), states[-1]))
    state, logits = decoder.join(states), torch.cat(first)
    rows = list(range(len(prompts)))
    while True:
        # A model may have more rows than the tokenizer has ids.
        chosen = logits[:, : tokenizer.vocab_size].argmax(-1).tolist()
        going = []
        for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            if token == tokenizer.eos_id:
                continue
            added[row].append(token)
            prompt = prompts[row]
            text = tokenizer.decode(added[row]) if prompt.until else ""
            if len(added[row]) < prompt.most and not any(word in text for word in prompt.until):
                going.append(place)
        if not going:
            break
        if len(going) < len(rows):
            state = decoder.select(state, torch.tensor(going))
            rows = [rows[place] for place in going]
        logits = decoder.step(torch.tensor([added[row][-1] for row in rows]), state)
    return [_before(tokenizer.decode(ids), prompt.until) for ids, prompt in zip(added, prompts, strict=True)]


def _before(text: str, until: Sequence[str]) -> str:
    return text[: min((text.find(word) for word in until if word in text), default=len(text))]
