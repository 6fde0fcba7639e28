"""Decodes token by token: memories are read as at the start of the span, and written at its end, as in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.data.batch import IGNORED
from pipeline.lm.decoding import Decoder, DecodingState
from pipeline.ops.attention import empty_carry
from pipeline.systems.neuromorphic.model.model import NeuromorphicModel
from pipeline.systems.neuromorphic.state import StreamState, Uses
from pipeline.systems.neuromorphic.stream_tensors import named, rows_of, stream_state, with_rows

PIECE = 1024
"""Tokens that a parallel pass takes at a time, about."""
LENGTHS, HELD, BEGIN = "lengths", "held", "begin."


@dataclasses.dataclass
class TextState(DecodingState):
    """What is kept of texts, of the same size however long they are.

    A span is written when the first token behind it is known, which its last token was to predict.
    """

    begin: StreamState
    """Before the span that each text is in."""
    read: StreamState
    """`hidden`, `working` and `segment` after the last token; the memories are those of `begin`."""
    ids: Tensor
    """[rows, P]: the tokens of the span so far."""
    segments: Tensor
    """[rows, P]."""
    positions: Tensor
    """[rows, P]."""
    segment: Tensor
    """[rows]: the document of the next token."""
    position: Tensor
    """[rows]: its place in it."""
    read_tokens: Tensor
    """[rows] int64 on the CPU: tokens so far."""
    held: Tensor
    """[rows] int64 on the CPU: tokens of the span that are not written yet, 0 to P."""

    @property
    def rows(self) -> int:
        return len(self.read_tokens)

    @property
    def lengths(self) -> Tensor:
        return self.read_tokens

    def tensors(self) -> dict[str, Tensor]:
        now = {f"read.{name}": tensor for name, tensor in named(self.read).items() if _is_read(name)}
        buffers = {name: getattr(self, name) for name in BUFFERS}
        begin = {f"{BEGIN}{name}": tensor for name, tensor in named(self.begin).items()}
        return {LENGTHS: self.read_tokens, HELD: self.held, **buffers, **begin, **now}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> TextState:
        """The inverse of `tensors`."""
        begin = {name.removeprefix(BEGIN): tensor for name, tensor in tensors.items() if name.startswith(BEGIN)}
        now = begin | {name.removeprefix("read."): t for name, t in tensors.items() if name.startswith("read.")}
        buffers = {name: tensors[name] for name in BUFFERS}
        counts = {"read_tokens": tensors[LENGTHS].cpu(), "held": tensors[HELD].cpu()}
        return TextState(stream_state(begin), stream_state(now), **counts, **buffers)

    def become(self, other: TextState) -> None:
        """Takes all that `other` has."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(other, field.name))


BUFFERS = ("ids", "segments", "positions", "segment", "position")


def _is_read(name: str) -> bool:
    return name in ("hidden", "segment") or name.startswith("working.")


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
        buffer = torch.zeros(rows, self.span, dtype=torch.int64, device=device)
        zero = torch.zeros(rows, dtype=torch.int64)
        return TextState(begin, begin, buffer, buffer, buffer, buffer[:, 0], buffer[:, 0], zero, zero)

    @torch.no_grad()
    def read(self, ids: Tensor, state: DecodingState) -> Tensor:
        return self._logits(self._read(ids, _own(state), every=False))[:, -1]

    @torch.no_grad()
    def logits(self, ids: Tensor, state: DecodingState) -> Tensor:
        return self._logits(self._read(ids, _own(state), every=True))

    @torch.no_grad()
    def step(self, ids: Tensor, state: DecodingState) -> Tensor:
        own = _own(state)
        if ids.shape != (own.rows,):
            raise ValueError(f"ids are {list(ids.shape)}; expected one per row, {[own.rows]}")
        ids = ids.to(self._like.device)
        self._write(ids, own)
        return self._logits(self._part(ids.unsqueeze(1), own))[:, 0]

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
        """What the head reads of every token, or of the last ones at the least, of ids [rows, tokens]."""
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
            self._read_alike(ids[rows.to(ids.device)], part, every=every)[:, -ids.shape[1] if every else -1 :]
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
            part = self._part(ids[:, done : done + room], state)
            found = [*found, part] if every else [part]
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

    def _part(self, ids: Tensor, state: TextState) -> Tensor:
        """What the head reads of ids [rows, tokens], which fit into the spans that the texts are in."""
        segments, positions = self._documents(ids, state)
        before = _with_memories(state.begin, state.read, state.begin.segment)
        span, working = self.model.spread(ids, segments, positions, before, self.uses)
        reading = self.model.read(span, before, self.uses, state.read.segment)
        state.read = dataclasses.replace(before, hidden=reading.hidden, working=working, segment=segments[:, -1])
        places = state.held.to(ids.device)[:, None] + torch.arange(ids.shape[1], device=ids.device)
        for name, new in (("ids", ids), ("segments", segments), ("positions", positions)):
            setattr(state, name, getattr(state, name).scatter(1, places, new))
        state.read_tokens, state.held = state.read_tokens + ids.shape[1], state.held + ids.shape[1]
        return reading.decoded

    def _write(self, ids: Tensor, state: TextState) -> None:
        """Writes the spans that are full; ids [rows] are the tokens behind them."""
        full = (state.held == self.span).nonzero().squeeze(1)
        if not len(full):
            return
        state.held = state.held.index_fill(0, full, 0)
        full = full.to(ids.device)
        begin = rows_of(state.begin, full)
        read, segments, positions = (x[full] for x in (state.ids, state.segments, state.positions))
        labels = self._labels(torch.cat([read, ids[full, None]], dim=1))
        written = self.model(read, labels, segments, positions, begin, self.uses).state
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
