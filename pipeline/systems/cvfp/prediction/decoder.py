"""Decodes with a model whose state of a text is one context vector, however long the text is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.lm.decoding import Decoder, DecodingState
from pipeline.systems.cvfp.model.model import CvfpModel
from pipeline.systems.cvfp.solve.sequential import sequential
from pipeline.systems.cvfp.solve.transition import shifted

CONTEXT, LENGTHS = "context", "lengths"
PIECE = 1024
"""Tokens whose contexts exist at a time."""


class ContextState(DecodingState):
    """The context [rows, D] after the last token of each text; zero before the first."""

    def __init__(self, context: Tensor, lengths: Tensor) -> None:
        self.context = context
        self._lengths = lengths

    @property
    def rows(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> Tensor:
        return self._lengths

    def advance(self, context: Tensor, tokens: int) -> None:
        """To the context after so many tokens more."""
        self.context, self._lengths = context, self._lengths + tokens

    def tensors(self) -> dict[str, Tensor]:
        return {CONTEXT: self.context, LENGTHS: self._lengths}


class CvfpDecoder(Decoder):
    """Decodes with a whole `CvfpModel`, on whatever device and in whatever precision it is: each text as one document.

    `zero`: every token is read with the context zero, as the model was trained.
    """

    def __init__(self, model: CvfpModel, *, zero: bool = False) -> None:
        self.model, self.zero = model, zero
        self.vocab_size, self.width = model.head.weight.shape

    def empty(self, rows: int) -> ContextState:
        return ContextState(self._like.new_zeros(rows, self.width), torch.zeros(rows, dtype=torch.int64))

    @torch.no_grad()
    def read(self, ids: Tensor, state: DecodingState) -> Tensor:
        own = self._checked(ids, state)
        for piece in ids.to(self._like.device).split(PIECE, dim=1):
            before = self._before(piece, own)
        # The states of the others are of no use.
        return self._logits(self._states(piece[:, -1:], before[:, -1:]))[:, 0]

    @torch.no_grad()
    def logits(self, ids: Tensor, state: DecodingState) -> Tensor:
        own = self._checked(ids, state)
        pieces = ids.to(self._like.device).split(PIECE, dim=1)
        return torch.cat([self._logits(self._states(piece, self._before(piece, own))) for piece in pieces], dim=1)

    @torch.no_grad()
    def step(self, ids: Tensor, state: DecodingState) -> Tensor:
        own = self._checked(ids.unsqueeze(1), state)
        before = own.context.unsqueeze(1)
        output = self.model(ids.to(self._like.device).unsqueeze(1), torch.zeros_like(before) if self.zero else before)
        assert output.contexts is not None and output.states is not None
        own.advance(own.context if self.zero else output.contexts[:, 0], 1)
        return self._logits(output.states)[:, 0]

    def select(self, state: DecodingState, rows: Tensor) -> ContextState:
        own = _own(state)
        return ContextState(own.context[rows.to(own.context.device)], own.lengths[rows.cpu()])

    def join(self, states: Sequence[DecodingState]) -> ContextState:
        own = [_own(state) for state in states]
        return ContextState(torch.cat([part.context for part in own]), torch.cat([part.lengths for part in own]))

    def restore(self, tensors: Mapping[str, Tensor]) -> ContextState:
        lengths, context = tensors.get(LENGTHS), tensors.get(CONTEXT)
        if lengths is None or lengths.dtype != torch.int64 or lengths.dim() != 1 or bool((lengths < 0).any()):
            raise ValueError(f"{LENGTHS} is not a list of numbers of tokens")
        expected = (len(lengths), self.width)
        if context is None or tuple(context.shape) != expected or context.dtype != self._like.dtype:
            raise ValueError(f"{CONTEXT} is not {list(expected)} numbers of the kind {self._like.dtype}")
        return ContextState(context.to(self._like.device), lengths.cpu())

    @property
    def _like(self) -> Tensor:
        return self.model.head.weight

    def _checked(self, ids: Tensor, state: DecodingState) -> ContextState:
        own = _own(state)
        if ids.dim() != 2 or len(ids) != own.rows or not ids.shape[1]:
            raise ValueError(f"ids are {list(ids.shape)}; expected [{own.rows}, tokens] with a token")
        return own

    def _before(self, ids: Tensor, state: ContextState) -> Tensor:
        """The context before each token [rows, tokens, D] of ids, which the state then has read."""
        if self.zero:
            state.advance(state.context, ids.shape[1])
            return self._like.new_zeros(*ids.shape, self.width)
        contexts = self.model(ids, start=state.context, solve=sequential).contexts
        assert contexts is not None
        before = shifted(contexts, state.context)
        state.advance(contexts[:, -1], ids.shape[1])
        return before

    def _states(self, ids: Tensor, before: Tensor) -> Tensor:
        states = self.model(ids, before).states
        assert states is not None
        return states

    def _logits(self, states: Tensor) -> Tensor:
        """[rows, tokens, vocabulary]."""
        found = F.linear(states, self.model.head.weight, self.model.head.bias)
        return found if found.dtype == torch.float64 else found.float()


def _own(state: DecodingState) -> ContextState:
    assert isinstance(state, ContextState)
    return state
