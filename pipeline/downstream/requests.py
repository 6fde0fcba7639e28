"""What the tasks ask of a model in tokens: how likely a continuation is behind a context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.data.batch import IGNORED

ROWS = 32
"""Texts that are read side by side at most: what a model keeps of each need not depend on its length."""


class Request(NamedTuple):
    """Ids of a context, at least one, and of what follows it, at least one."""

    context: list[int]
    continuation: list[int]


class Likelihood(NamedTuple):
    """Of a continuation behind its context."""

    log_likelihood: float
    """In nats: the sum over the continuation's tokens of their log-probabilities."""
    greedy: bool
    """Whether each of its tokens is the likeliest one at its place."""


class Scorer(Protocol):
    """A model that says how likely continuations are."""

    limit: int | None
    """Tokens that it reads at most; of a longer text the last ones are read. None: any number."""

    def score(self, requests: Sequence[Request]) -> list[Likelihood]:
        """In their order. `limit` has room for every continuation. Collective where several ranks run the model: they
        give the same requests and get the same answers."""
        ...


class Group(NamedTuple):
    """Requests that are read side by side: their numbers, and the tokens of the longest."""

    members: list[int]
    width: int


def removed(request: Request, limit: int | None) -> int:
    """Tokens at the front of a request that a model with this limit does not read; the last token is not read but
    predicted."""
    return 0 if limit is None else max(0, len(request.context) + len(request.continuation) - 1 - limit)


def width_of(request: Request, limit: int | None) -> int:
    """Tokens of a request that are read."""
    return len(request.context) + len(request.continuation) - 1 - removed(request, limit)


def groups(widths: Sequence[int], tokens: int, ranks: int = 1) -> Iterator[Group]:
    """All numbers from 0 on in groups, the longest first: memory is found to be short at once, and rows of a group are
    about equally long. A group has at most `tokens` tokens on each of `ranks` ranks, padding included, or one row, and
    at most `ROWS` rows."""
    order = sorted(range(len(widths)), key=lambda number: (-widths[number], number))
    while order:
        width = widths[order[0]]
        count = ranks * min(ROWS, max(1, tokens // max(1, width)))
        yield Group(order[:count], width)
        order = order[count:]


def rows_of(requests: Sequence[Request], limit: int | None, width: int, padding: int) -> tuple[Tensor, Tensor]:
    """(ids, labels), each [rows, width] int64 on the CPU: every request read from the left, with labels where a token
    of its continuation is predicted and `IGNORED` elsewhere. What stands behind a text, to make rows equally long,
    changes nothing before it."""
    ids = torch.full((len(requests), width), padding)
    labels = torch.full_like(ids, IGNORED)
    for row, request in enumerate(requests):
        text = [*request.context, *request.continuation][removed(request, limit) :]
        length = len(text) - 1
        ids[row, :length] = torch.tensor(text[:-1])
        labels[row, length - len(request.continuation) : length] = torch.tensor(request.continuation)
    return ids, labels
