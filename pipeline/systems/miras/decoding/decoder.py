"""The decoder of the miras system."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.lm.backbone import rope_of
from pipeline.lm.decoder_config import head_dim, kv_heads
from pipeline.lm.decoding import Decoder, DecodingState
from pipeline.ops.attention_sinks import NO_TOKEN, WindowCarry
from pipeline.ops.gates import Gates
from pipeline.ops.key_cache import KeyCache
from pipeline.parallel.topology import Topology
from pipeline.systems.miras.context_memory import ContextBranch
from pipeline.systems.miras.decoding.branch import BranchSteps
from pipeline.systems.miras.decoding.context import ContextSteps
from pipeline.systems.miras.decoding.overflow import OverflowSteps
from pipeline.systems.miras.decoding.slots import SlotSteps
from pipeline.systems.miras.decoding.state import LENGTHS, LayerState, MirasState
from pipeline.systems.miras.decoding.steps import LayerSteps, MemorySteps, RulePass
from pipeline.systems.miras.decoding.token import run_token
from pipeline.systems.miras.inside import LayerCarry
from pipeline.systems.miras.model import MirasModel
from pipeline.systems.miras.overflow import OverflowBranch
from pipeline.systems.miras.rules import State
from pipeline.systems.miras.slots import SlotBranch

PIECE = 1024
"""Tokens that a parallel pass takes at a time, about."""
SHORT = 8
"""Fewer tokens than this are read one by one: a parallel pass rearranges the whole window first."""
SCORES = 2**24
"""Most logits per head of a piece's full attention."""


class MirasDecoder(Decoder):
    """Decodes with a whole `MirasModel`, on whatever device and in whatever precision it is.

    Text is read in pieces by the model itself, which carries its state from one to the next; the last carry becomes
    the decoding state. The gradients of a chunk-start rule are taken at the start of its chunk, and chunks are
    counted from the start of the text: pieces end where chunks do.
    """

    def __init__(self, model: MirasModel, *, piece: int = PIECE, limit: int | None = None) -> None:
        """`piece`: tokens that a parallel pass takes at a time, about; `limit`: of a text at the most, None: any."""
        backbone: Any = model.backbone
        self.model, self.limit = model, limit
        self.vocab_size = backbone.config.vocab_size
        # The backend of training may belong to another device.
        self.attention = dataclasses.replace(model.config.attention, backend="auto")
        self.window = self.attention.window if self.attention.kind == "window" else None
        self.sinks = self.attention.sinks if self.attention.kind == "window" else 0
        self.rope = rope_of(backbone)
        self.memories = {index: self._steps(model.memory[str(index)]) for index in model.kinds}
        self.grain = math.lcm(*(steps.grain for steps in self.memories.values()))
        self.piece = max(1, piece // self.grain) * self.grain

    def empty(self, rows: int) -> MirasState:
        config, like = self.model.backbone.config, self._like
        layers = []
        for index in range(config.num_hidden_layers):
            steps = self.memories.get(index)
            cache = KeyCache.empty(
                rows, kv_heads(config), head_dim(config), window=self.window, sinks=self.sinks, like=like
            )
            layers.append(LayerState(cache, None if steps is None else steps.empty(rows, like)))
        return MirasState(torch.zeros(rows, dtype=torch.int64), layers)

    @torch.no_grad()
    def read(self, ids: Tensor, state: DecodingState) -> Tensor:
        return self._logits(self._read(ids, _own(state), every=False)[:, -1])

    @torch.no_grad()
    def logits(self, ids: Tensor, state: DecodingState) -> Tensor:
        return self._logits(self._read(ids, _own(state), every=True))

    @torch.no_grad()
    def step(self, ids: Tensor, state: DecodingState) -> Tensor:
        return self._logits(self._step(ids, _own(state))[:, -1])

    @torch.no_grad()
    def select(self, state: DecodingState, rows: Tensor) -> MirasState:
        return _own(state).select(rows)

    @torch.no_grad()
    def join(self, states: Sequence[DecodingState]) -> MirasState:
        return MirasState.join([_own(state) for state in states])

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> MirasState:
        lengths = tensors.get(LENGTHS)
        if lengths is None or lengths.dtype != torch.int64 or lengths.dim() != 1 or bool((lengths < 0).any()):
            raise ValueError(f"{LENGTHS} is not a list of numbers of tokens")
        return self.empty(len(lengths)).restored(tensors, lengths.cpu(), self.rope)

    @property
    def _like(self) -> Tensor:
        weight: Tensor = self.model.backbone.model.embed_tokens.weight
        return weight

    def _steps(self, branch: nn.Module) -> LayerSteps:
        if isinstance(branch, ContextBranch):
            return ContextSteps(branch)
        if isinstance(branch, OverflowBranch):
            assert self.window is not None
            return OverflowSteps(branch, self.window, self.sinks)
        if isinstance(branch, SlotBranch):
            assert self.window is not None
            return SlotSteps(branch, self.window, self.sinks)
        return BranchSteps(branch)  # type: ignore[arg-type]

    def _logits(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.model.backbone.lm_head(hidden)
        return found if found.dtype == torch.float64 else found.float()

    def _step(self, ids: Tensor, state: MirasState) -> Tensor:
        """Hidden states [rows, 1, width] of one token per row."""
        if ids.shape != (state.rows,):
            raise ValueError(f"ids are {list(ids.shape)}; expected one per row, {[state.rows]}")
        hidden = run_token(self.model, self.memories, ids.to(self._like.device), state, self.rope)
        state.advance(1)
        return hidden

    def _read(self, ids: Tensor, state: MirasState, *, every: bool) -> Tensor:
        """Hidden states of every token, or of the last ones at the least, of ids [rows, tokens]."""
        if ids.dim() != 2 or ids.shape[0] != state.rows or ids.shape[1] == 0:
            raise ValueError(f"ids are {list(ids.shape)}; expected [{state.rows}, tokens] with a token")
        lengths = state.lengths.unique().tolist()
        if len(lengths) == 1:
            return self._read_alike(ids, state, lengths[0], every=every)
        # A parallel pass cuts all its rows at the same places.
        groups = [(state.lengths == length).nonzero().squeeze(1) for length in lengths]
        parts = [state.select(rows) for rows in groups]
        found = [
            self._read_alike(ids[rows.to(ids.device)], part, length, every=every)[:, -ids.shape[1] if every else -1 :]
            for rows, part, length in zip(groups, parts, lengths, strict=True)
        ]
        order = torch.cat(groups).argsort()
        state.become(MirasState.join(parts).select(order))
        return torch.cat(found)[order.to(found[0].device)]

    def _read_alike(self, ids: Tensor, state: MirasState, length: int, *, every: bool) -> Tensor:
        """As `_read`, of rows that all have read `length` tokens."""
        tokens = ids.shape[1]
        found: list[Tensor] = []

        def keep(hidden: Tensor) -> None:
            if not every:
                found.clear()
            found.append(hidden)

        done = tokens if tokens < SHORT else min(tokens, -length % self.grain)
        for place in range(done):
            keep(self._step(ids[:, place], state))
        if done == tokens:
            return torch.cat(found, dim=1)
        ids, stepped = ids.to(self._like.device), done
        carry = self._carry(state, length + done) if length + done else None
        within: dict[int, RulePass] = {}
        before = carry
        rest = tokens - (tokens - done) % self.grain
        while done < tokens:
            # What begins a chunk and does not end it is a pass of its own.
            last = done == rest
            end = tokens if last else min(rest, done + self._piece(length + done))
            before = carry
            with self._kept_passes() if last else nullcontext(within) as within:
                hidden, carry = self._pass(ids[:, done:end], carry, length + done)
            keep(hidden)
            done = end
        assert carry is not None
        for index, (layer, left) in enumerate(zip(state.layers, carry, strict=True)):
            assert left.attention is not None
            layer.attention.load(left.attention, length + tokens, self.rope)
            if left.memory is not None:
                began = None if before is None else before[index]
                layer.memory = self.memories[index].loaded(left, length + tokens, within.get(index), began)
        state.advance(tokens - stepped)
        return torch.cat(found, dim=1)

    def _pass(self, ids: Tensor, carry: list[LayerCarry] | None, length: int) -> tuple[Tensor, list[LayerCarry]]:
        """Hidden states of ids [rows, tokens] that follow `length` others, and the carry behind them."""
        tokens, attention = ids.shape[1], self.attention
        if self.window is None:
            # Full attention reaches into no earlier pass; a window as long as the text does.
            attention = dataclasses.replace(attention, kind="window", window=length + tokens, sinks=0)
            carry = [_widened(layer, tokens) for layer in carry] if carry else None
        segments = torch.zeros_like(ids)
        positions = torch.arange(length, length + tokens, device=ids.device).expand_as(ids)
        output = self.model(ids, None, segments, positions, carry, Topology(), attention=attention)
        return output.hidden, output.carry

    def _carry(self, state: MirasState, length: int) -> list[LayerCarry]:
        """What a parallel pass goes on with, of rows of `length` tokens each."""
        found = []
        for index, layer in enumerate(state.layers):
            memory = None if layer.memory is None else self.memories[index].carry(layer.memory, length)
            found.append(LayerCarry(layer.attention.carry(length, self.window or length), memory))
        return found

    def _piece(self, length: int) -> int:
        """Tokens of the next piece behind `length` others."""
        if self.window is not None:
            return self.piece
        return max(self.grain, min(self.piece, SCORES // (length + self.piece) // self.grain * self.grain))

    @contextmanager
    def _kept_passes(self) -> Iterator[dict[int, RulePass]]:
        """What the rules that step by the chunk do meanwhile, by layer."""
        found: dict[int, RulePass] = {}

        def keep(index: int, _: nn.Module, arguments: tuple[Any, ...], output: tuple[Tensor, State, Gates]) -> None:
            found[index] = RulePass(arguments[6], *output[1:])

        handles = [
            steps.module.register_forward_hook(partial(keep, index))
            for index, steps in self.memories.items()
            if isinstance(steps, MemorySteps) and steps.grain > 1
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def _own(state: DecodingState) -> MirasState:
    if not isinstance(state, MirasState):
        raise TypeError(f"a {type(state).__name__} is not a state of this decoder")
    return state


def _widened(layer: LayerCarry, tokens: int) -> LayerCarry:
    """The carry for a window that is longer by so many tokens."""
    carry = layer.attention
    assert carry is not None
    k, v = (F.pad(x, (0, 0, 0, 0, tokens, 0)) for x in (carry.k, carry.v))
    ids = F.pad(carry.segment_ids, (tokens, 0), value=NO_TOKEN)
    return layer._replace(attention=WindowCarry(k, v, ids, F.pad(carry.positions, (tokens, 0)), *carry[4:]))
