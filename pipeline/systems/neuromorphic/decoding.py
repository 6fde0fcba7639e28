"""Decodes token by token: memories are read as at the start of the span, and written at its end, as in training.

Each token goes through the model once: a write takes what was kept of the span's tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.data.batch import IGNORED
from pipeline.lm.decoding import Decoder, DecodingState
from pipeline.ops.attention import empty_carry
from pipeline.systems.neuromorphic.model.model import NeuromorphicModel
from pipeline.systems.neuromorphic.model.span import Reading, Span
from pipeline.systems.neuromorphic.state import StreamState, Uses
from pipeline.systems.neuromorphic.stream_tensors import rows_of, with_rows
from pipeline.systems.neuromorphic.text_state import HELD, LENGTHS, TextState

PIECE = 1024
"""Tokens that a parallel pass takes at a time, about."""


class NeuromorphicDecoder(Decoder):
    """Decodes with a whole `NeuromorphicModel`, on whatever device and in whatever precision it is."""

    def __init__(self, model: NeuromorphicModel, uses: Uses, *, eos_id: int | None = None, piece: int = PIECE) -> None:
        """`uses`: the memories of the phase that the model comes from. `eos_id`: the id that ends a document; None: a
        text is one."""
        self.model, self.uses, self.eos_id, self.span = model, uses, eos_id, model.span
        self.vocab_size = model.head.weight.shape[0]
        self.spans = max(1, piece // model.span)

    def empty(self, rows: int) -> TextState:
        device, sizes = self._like.device, self.model.sizes
        wide = torch.promote_types(self._like.dtype, torch.float32)
        heads, width = sizes.working_heads, sizes.working_width // sizes.working_heads
        working = empty_carry(rows, sizes.window, 0, heads, width, wide, device)
        begin = dataclasses.replace(self.model.initial_state(rows, device, wide), working=working)
        ids = torch.zeros(rows, self.span, dtype=torch.int64, device=device)
        x = torch.zeros(rows, self.span, sizes.width, dtype=wide, device=device)
        layers = x.new_zeros(rows, self.span, sizes.layers + 1, sizes.columns, sizes.column_width)
        nats, behind = x.new_zeros(rows, self.span), x.new_zeros(rows, self.vocab_size)
        zero = torch.zeros(rows, dtype=torch.int64)
        return TextState(begin, begin, ids, ids, x, x, layers, nats, behind, ids[:, 0], ids[:, 0], zero, zero)

    @torch.no_grad()
    def read(self, ids: Tensor, state: DecodingState) -> Tensor:
        return self._read(ids, _own(state), every=False)[:, -1]

    @torch.no_grad()
    def logits(self, ids: Tensor, state: DecodingState) -> Tensor:
        return self._read(ids, _own(state), every=True)

    @torch.no_grad()
    def step(self, ids: Tensor, state: DecodingState) -> Tensor:
        own = _own(state)
        if ids.shape != (own.rows,):
            raise ValueError(f"ids are {list(ids.shape)}; expected one per row, {[own.rows]}")
        ids = ids.to(self._like.device)
        self._write(ids, own)
        return self._part(ids.unsqueeze(1), own, every=False)[:, 0]

    @torch.no_grad()
    def select(self, state: DecodingState, rows: Tensor) -> TextState:
        found = {name: x.index_select(0, rows.to(x.device)) for name, x in state.tensors().items()}
        return TextState.of(found)

    @torch.no_grad()
    def join(self, states: Sequence[DecodingState]) -> TextState:
        every = [state.tensors() for state in states]
        return TextState.of({name: torch.cat([tensors[name] for tensors in every]) for name in every[0]})

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> TextState:
        lengths = tensors.get(LENGTHS)
        if lengths is None or lengths.dtype != torch.int64 or lengths.dim() != 1 or bool((lengths < 0).any()):
            raise ValueError(f"{LENGTHS} is not a list of numbers of tokens")
        found = {}
        for name, like in self.empty(len(lengths)).tensors().items():
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise ValueError(f"{name} is not {list(like.shape)} numbers of the kind {like.dtype}")
            found[name] = tensor.to(like.device)
        if bool(((found[HELD] < 0) | (found[HELD] > self.span)).any()):
            raise ValueError(f"{HELD} is not numbers of tokens of a span")
        return TextState.of(found)

    @property
    def _like(self) -> Tensor:
        return self.model.head.weight

    def _logits(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.model.head(hidden)
        return found if found.dtype == torch.float64 else found.float()

    def _read(self, ids: Tensor, state: TextState, *, every: bool) -> Tensor:
        """Logits [rows, tokens, vocabulary] of ids [rows, tokens]; those of the last token alone unless `every`."""
        if ids.dim() != 2 or ids.shape[0] != state.rows or ids.shape[1] == 0:
            raise ValueError(f"ids are {list(ids.shape)}; expected [{state.rows}, tokens] with a token")
        ids, held = ids.to(self._like.device), state.held % self.span
        places = held.unique().tolist()
        if len(places) == 1:
            return self._read_alike(ids, state, every=every)
        # A parallel pass cuts all its rows at the same places.
        groups = [(held == place).nonzero().squeeze(1) for place in places]
        parts = [self.select(state, rows) for rows in groups]
        found = [
            self._read_alike(ids[rows.to(ids.device)], part, every=every)
            for rows, part in zip(groups, parts, strict=True)
        ]
        order = torch.cat(groups).argsort()
        state.become(self.select(self.join(parts), order))
        return torch.cat(found)[order.to(found[0].device)]

    def _read_alike(self, ids: Tensor, state: TextState, *, every: bool) -> Tensor:
        """As `_read`, of rows whose spans end at the same places."""
        found: list[Tensor] = []
        done, tokens = 0, ids.shape[1]
        while done < tokens:
            self._write(ids[:, done], state)
            room = self.span - int(state.held[0])
            whole = min((tokens - done - 1) // self.span, self.spans)
            if not every and room == self.span and whole:
                # These spans are written at once: the token behind them is known.
                self._spans(ids[:, done : done + whole * self.span + 1], state)
                done += whole * self.span
                continue
            part = ids[:, done : done + room]
            logits = self._part(part, state, every=every)
            found = [*found, logits] if every else [logits]
            done += part.shape[1]
        return torch.cat(found, dim=1)

    def _spans(self, ids: Tensor, state: TextState) -> None:
        """Reads and writes whole spans of ids [rows, tokens + 1], of which the last is the one behind them."""
        inputs = ids[:, :-1]
        segments, positions = self._documents(inputs, state)
        output = self.model(inputs, self._labels(ids), segments, positions, state.begin, self.uses)
        state.begin = state.read = output.state
        state.read_tokens = state.read_tokens + inputs.shape[1]

    def _labels(self, ids: Tensor) -> Tensor:
        """Of all ids but the last, as in training: what follows, and nothing behind a document's end."""
        labels = ids[:, 1:]
        return labels if self.eos_id is None else labels.masked_fill(ids[:, :-1] == self.eos_id, IGNORED)

    def _documents(self, ids: Tensor, state: TextState) -> tuple[Tensor, Tensor]:
        """Segment ids and positions of ids [rows, tokens], which come next; the state goes on behind them."""
        ended = torch.zeros_like(ids, dtype=torch.bool) if self.eos_id is None else ids == self.eos_id
        place = torch.arange(ids.shape[1] + 1, device=ids.device)
        counts = torch.nn.functional.pad(ended.long().cumsum(1), (1, 0)) + state.segment[:, None]
        starts = torch.nn.functional.pad(torch.where(ended, place[1:], -state.position[:, None]), (1, 0))
        starts[:, 0] = -state.position
        positions = place - starts.cummax(1).values
        state.segment, state.position = counts[:, -1], positions[:, -1]
        return counts[:, :-1], positions[:, :-1]

    def _part(self, ids: Tensor, state: TextState, *, every: bool) -> Tensor:
        """As `_read`, of ids [rows, tokens] that fit into the spans that the texts are in."""
        segments, positions = self._documents(ids, state)
        before = _with_memories(state.begin, state.read, state.begin.segment)
        span, working = self.model.spread(ids, segments, positions, before, self.uses)
        reading = self.model.read(span, before, self.uses, state.read.segment)
        state.read = dataclasses.replace(before, hidden=reading.hidden, working=working, segment=segments[:, -1])
        if every:
            logits = self._logits(reading.decoded)
            nats = cross_entropy(rearrange(logits[:, :-1], "n t v -> n v t"), ids[:, 1:], reduction="none")
        else:
            logits = self._logits(reading.decoded[:, -1:])
            nats = logits.new_zeros(state.rows, 0)
            if ids.shape[1] > 1:
                nats, _ = self.model.head(reading.decoded[:, :-1], ids[:, 1:])
        layers = rearrange(torch.stack(reading.layers), "l b n t h -> n t l b h")
        places = state.held.to(ids.device)[:, None] + torch.arange(ids.shape[1], device=ids.device)
        rows = torch.arange(state.rows, device=ids.device)[:, None]
        kept = {"ids": ids, "segments": segments, "x": span.x, "says": span.working, "layers": layers}
        for name, new in kept.items():
            old = getattr(state, name)
            setattr(state, name, old.index_put((rows, places), new.to(old.dtype)))
        state.nats = state.nats.index_put((rows, places[:, :-1]), nats.to(state.nats.dtype))
        # A copy: the caller may change what it gets.
        state.behind = logits[:, -1].clone()
        state.read_tokens, state.held = state.read_tokens + ids.shape[1], state.held + ids.shape[1]
        return logits

    def _write(self, ids: Tensor, state: TextState) -> None:
        """Takes in how surprising ids [rows] are, which come next, and writes the spans that they stand behind."""
        held = state.held.to(ids.device)[:, None]
        last = (held - 1).clamp(min=0)
        nats = cross_entropy(state.behind, ids, reduction="none")[:, None]
        state.nats = state.nats.scatter(1, last, torch.where(held > 0, nats, state.nats.gather(1, last)))
        full = (state.held == self.span).nonzero().squeeze(1)
        if not len(full):
            return
        state.held = state.held.index_fill(0, full, 0)
        full = full.to(ids.device)
        begin, read = rows_of(state.begin, full), rows_of(_with_memories(state.begin, state.read), full)
        labels = self._labels(torch.cat([state.ids[full], ids[full, None]], dim=1))
        # A write reads neither the columns' inputs but the first layer's, nor the decoder's output.
        x, says, made = (kept[full].to(self._like.dtype) for kept in (state.x, state.says, state.layers))
        nothing, layers = x.new_empty(0), tuple(rearrange(made, "n t l b h -> l b n t h"))
        span = Span(x, says, layers[0], nothing, state.segments[full])
        reading = Reading(nothing, layers, read.hidden, {})
        written = self.model.write(span, reading, state.nats[full], labels, begin, self.uses).state
        written = dataclasses.replace(written, working=read.working)
        if len(full) == state.rows:
            state.begin = state.read = written
        else:
            state.begin = with_rows(state.begin, full, written)
            state.read = with_rows(_with_memories(state.begin, state.read), full, written)


def _with_memories(begin: StreamState, read: StreamState, segment: Tensor | None = None) -> StreamState:
    """What was `read`, with the memories of `begin`; `segment` None: the document of the last token."""
    segment = read.segment if segment is None else segment
    return dataclasses.replace(begin, hidden=read.hidden, working=read.working, segment=segment)


def _own(state: DecodingState) -> TextState:
    if not isinstance(state, TextState):
        raise TypeError(f"a {type(state).__name__} is not a state of this decoder")
    return state
