"""A decoder without a model: what comes next is a function of the tokens before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.lm.decoding import Decoder, DecodingState

Next = Callable[[list[int]], Tensor]


class History(DecodingState):
    """The tokens themselves."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts

    @property
    def rows(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(text) for text in self.texts], dtype=torch.int64)

    def tensors(self) -> dict[str, Tensor]:
        width = max(map(len, self.texts), default=0)
        return {"texts": torch.tensor([[-1] * (width - len(text)) + text for text in self.texts])}


class FakeDecoder(Decoder):
    """Logits [vocabulary] of the tokens so far are `following(tokens)`. `calls`: rows of every step."""

    def __init__(self, following: Next, vocabulary: int, limit: int | None = None) -> None:
        self.following, self.vocab_size, self.limit = following, vocabulary, limit
        self.calls: list[int] = []

    def empty(self, rows: int) -> History:
        return History([[] for _ in range(rows)])

    def read(self, ids: Tensor, state: DecodingState) -> Tensor:
        return self.logits(ids, state)[:, -1]

    def logits(self, ids: Tensor, state: DecodingState) -> Tensor:
        assert isinstance(state, History)
        found = []
        for text, new in zip(state.texts, ids.tolist(), strict=True):
            found.append(torch.stack([self.following(text + new[: end + 1]) for end in range(len(new))]))
            text.extend(new)
        return torch.stack(found)

    def step(self, ids: Tensor, state: DecodingState) -> Tensor:
        self.calls.append(state.rows)
        return self.read(ids.unsqueeze(1), state)

    def select(self, state: DecodingState, rows: Tensor) -> History:
        assert isinstance(state, History)
        return History([list(state.texts[row]) for row in rows.tolist()])

    def join(self, states: Sequence[DecodingState]) -> History:
        return History([list(text) for state in states if isinstance(state, History) for text in state.texts])

    def restore(self, tensors: Mapping[str, Tensor]) -> History:
        return History([[token for token in text if token >= 0] for text in tensors["texts"].tolist()])


def pseudo_random(vocabulary: int, seed: int = 0) -> Next:
    """Logits that every token before decides."""

    def following(tokens: list[int]) -> Tensor:
        mixed = seed + 1
        for token in tokens:
            mixed = (mixed * 1_000_003 + token + 7) % 2**61
        return torch.randn(vocabulary, generator=torch.Generator().manual_seed(mixed))

    return following


def scripted(script: Sequence[int], start: int, vocabulary: int) -> Next:
    """The tokens of `script`, one after the other, behind `start` tokens."""

    def following(tokens: list[int]) -> Tensor:
        place = min(max(0, len(tokens) - start), len(script) - 1)
        return torch.nn.functional.one_hot(torch.tensor(script[place]), vocabulary).float() * 100

    return following
