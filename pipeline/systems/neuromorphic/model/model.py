"""The model: columns of gated layers, read span by span, and the memories that are written between two spans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.data.batch import IGNORED
from pipeline.lm.loss_head import LossHead
from pipeline.ops.attention import WindowCarry
from pipeline.systems.neuromorphic.columns import ColumnLinear, SharedColumnLinear
from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.memory.episodic import EpisodicMemory
from pipeline.systems.neuromorphic.memory.procedural import ProceduralMemory
from pipeline.systems.neuromorphic.memory.resets import reset_episodic, reset_procedural
from pipeline.systems.neuromorphic.model.decoder import SpatialDecoder
from pipeline.systems.neuromorphic.model.layer import GatedLayer
from pipeline.systems.neuromorphic.model.span import Reading, Span
from pipeline.systems.neuromorphic.model.working_memory import WorkingMemory
from pipeline.systems.neuromorphic.state import StreamState, Uses

SURPRISING = 5.0
"""Nats from which on a token is eligible in full."""
NOTHING = -1
"""The document before the first."""
EVERYTHING = Uses()


class NeuromorphicOutput(NamedTuple):
    """What a forward pass over T tokens of N rows gives."""

    losses: Tensor | None
    """[N, T] nats per label, 0 where it is ignored; float32, or float64 for a model in float64."""
    state: StreamState
    """After the last span; it has a graph."""
    penalties: dict[str, Tensor]
    """Scalars by memory, where it is written: what the strengths exceed .9 of their budget by, summed over rows and
    instances, a mean over spans. Neither weighted nor divided by rows."""
    predictions: Tensor | None
    """[N, T] int64, the likeliest next token, where asked for."""
    hidden: Tensor | None
    """[N, T, D], what the head reads, where there are no labels."""
    statistics: dict[str, tuple[Tensor, Tensor]]
    """(sum, count) over rows and spans, where asked for: detached sums [L, B] or [B], scalar counts."""


class Written(NamedTuple):
    """The state after a span, penalties by memory as sums over rows, and detached measures [L, B] or [B]."""

    state: StreamState
    penalties: dict[str, Tensor]
    measures: dict[str, Tensor]


class NeuromorphicModel(nn.Module):
    """All modules of every phase. Whatever reads weights goes through a call of a module, since ZeRO-3 gathers them so.

    A pass goes from span to span: `read` and the head, then `write`. These, `spread` and `initial_state` are there for
    decoding too, which reads a span token by token and writes at its end.
    """

    def __init__(self, config: NeuromorphicConfig) -> None:
        super().__init__()
        sizes = config.sizes
        width, columns, inner = sizes.width, sizes.columns, sizes.column_width
        self.config, self.sizes, self.span = config, sizes, config.span
        self.embedding = nn.Embedding(config.vocab, width)
        self.column_input = nn.Linear(width, width, bias=False)
        self.working = WorkingMemory(
            width, sizes.working_width, sizes.working_heads, sizes.window, rotated=not config.as_published
        )
        self.working_input = SharedColumnLinear(columns, width, inner, bias=False)
        self.episodic_input = ColumnLinear(columns, width, inner, bias=False)
        self.layers = nn.ModuleList(
            [GatedLayer(columns, inner, scaled=not config.as_published) for _ in range(sizes.layers)]
        )
        self.procedural = ProceduralMemory(config)
        self.episodic = EpisodicMemory(config)
        self.decoder = SpatialDecoder(config) if config.decoder else None
        self.head = LossHead(width, config.vocab, bias=False)

    def initial_state(self, rows: int, device: torch.device, dtype: torch.dtype = torch.float32) -> StreamState:
        """Of `rows` streams that have seen nothing; dtype float32, float64 for a model in float64."""
        sizes = self.sizes
        shape = (rows, sizes.layers, sizes.columns, sizes.column_width)
        return StreamState(
            hidden=torch.zeros(shape, dtype=dtype, device=device),
            surprise=torch.zeros(rows, dtype=dtype, device=device),
            segment=torch.full((rows,), NOTHING, dtype=torch.int64, device=device),
            working=None,
            procedural=self.procedural.initial_state(rows, dtype),
            episodic=self.episodic.initial_state(rows, dtype, device),
        )

    def forward(
        self,
        ids: Tensor,
        labels: Tensor | None,
        segment_ids: Tensor,
        positions: Tensor,
        state: StreamState | None = None,
        uses: Uses = EVERYTHING,
        *,
        predict: bool = False,
        statistics: bool = False,
        checkpointing: bool = False,
    ) -> NeuromorphicOutput:
        """Losses of labels [N, T] and what the streams carry on.

        ids, labels, segment_ids and positions [N, T] int64 as `TokenBatch` has them; T is a multiple of the span.
        `state` None: streams that begin here. Without labels there are hidden states in place of losses, and nothing
        is written: how surprising the tokens were is not known. `checkpointing`: the backward pass computes each span
        again. Raises ValueError where T is no multiple of the span.
        """
        rows, tokens = ids.shape
        if tokens % self.span:
            raise ValueError(f"{tokens} tokens are no whole number of spans of {self.span}")
        if state is None:
            wide = torch.promote_types(self.head.weight.dtype, torch.float32)
            state = self.initial_state(rows, ids.device, wide)
        whole, carry = self.spread(ids, segment_ids, positions, state, uses)
        recompute = checkpointing and torch.is_grad_enabled()

        def run(function: Callable[..., Any], *arguments: Any) -> Any:
            if recompute:
                return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
            return function(*arguments)

        losses, predictions, hidden = [], [], []
        penalties: dict[str, Tensor] = {}
        measured: dict[str, Tensor] = {}
        spans = tokens // self.span
        parts = (
            whole.x.split(self.span, 1), whole.working.split(self.span, 1), whole.columns.split(self.span, 2),
            whole.context.split(self.span, 2), whole.segment_ids.split(self.span, 1),
        )  # fmt: skip
        for index, part in enumerate(zip(*parts, strict=True)):
            span = Span(*part)
            reading = run(self.read, span, state, uses, None, statistics)
            found = wanted = None
            if labels is None:
                hidden.append(reading.decoded)
            else:
                wanted = labels[:, index * self.span : (index + 1) * self.span]
                found, predicted = self.head(reading.decoded, wanted, predict)
                losses.append(found)
                predictions.append(predicted)
            written = run(self.write, span, reading, found, wanted, state, uses, statistics)
            state = written.state
            for name, value in written.penalties.items():
                penalties[name] = penalties.get(name, 0.0) + value / spans
            for name, value in (reading.statistics | written.measures).items():
                measured[name] = measured.get(name, 0.0) + rows * value
        if statistics and uses.working == "on":
            seen = self.working.statistics(whole.x, segment_ids, positions, state.working, self.span)
            measured |= {name: rows * spans * value for name, value in seen.items()}
        count = torch.full((), float(rows * spans), device=ids.device)
        return NeuromorphicOutput(
            torch.cat(losses, dim=1) if losses else None,
            dataclasses.replace(state, working=carry),
            penalties,
            torch.cat(predictions, dim=1) if predict and predictions else None,
            torch.cat(hidden, dim=1) if hidden else None,
            {name: (value, count) for name, value in measured.items()},
        )

    def spread(
        self, ids: Tensor, segment_ids: Tensor, positions: Tensor, state: StreamState, uses: Uses
    ) -> tuple[Span, WindowCarry | None]:
        """What comes to the columns of any number of tokens [N, T], and the working memory after them, in the dtype of
        state. Of `state` the working memory alone is read."""
        x = self.embedding(ids)
        working, carry = self.working(x, segment_ids, positions, state.working, uses.working)
        columns = rearrange(self.column_input(x), "n t (b h) -> b n t h", b=self.sizes.columns).contiguous()
        if carry is not None:
            carry = WindowCarry(*(x.to(state.hidden.dtype) if x.is_floating_point() else x for x in carry))
        return Span(x, working, columns, self.working_input(working), segment_ids), carry

    def read(
        self, span: Span, state: StreamState, uses: Uses, before: Tensor | None = None, statistics: bool = False
    ) -> Reading:
        """The columns and the decoder over the tokens of a span, or a part of it.

        `state` is that before the span; for a later part `hidden` is that after the part before, and `before` [N] the
        document of its last token, while memories and `segment` stay those before the span. A token reads the memories
        if its document is `state.segment`, or anywhere when they are lifelong.
        """
        dtype, ids = span.x.dtype, span.segment_ids
        same = ids == state.segment[:, None]
        alive = torch.ones_like(same) if uses.lifelong else same
        procedural_alive = alive if uses.procedural == "on" else torch.zeros_like(alive)
        episodic_alive = alive if uses.episodic == "on" else torch.zeros_like(alive)
        surprise = state.surprise[:, None] * same
        goes_on = ids[:, 0] == (state.segment if before is None else before)
        hidden = torch.where(goes_on[:, None, None, None], state.hidden, 0)

        episodic_says = torch.zeros_like(span.context)
        if uses.episodic != "absent":
            episodes = self.episodic.read(span.x, span.working, state.episodic, episodic_alive)
            episodic_says = self.episodic_input(episodes)
        context = torch.cat((span.context, episodic_says), dim=-1)

        layers, after, gates = [span.columns], [], []
        for index, layer in enumerate(self.layers):
            x = layers[-1]
            says = torch.zeros_like(x)
            if uses.procedural != "absent":
                says = self.procedural.read(index, x, state.procedural, procedural_alive)
            out, h, found = layer(x, says, context, surprise, hidden[:, index], ids)
            layers.append(out)
            after.append(h)
            if statistics:
                gates.append(found.statistics())

        if self.decoder is None:
            decoded = rearrange(layers[-1], "b n p h -> n p (b h)")
        else:
            # Of each token: what the memories hold, as far as it may read them.
            weighted = self.procedural.summary(state.procedural).to(dtype)[:, None] * procedural_alive[..., None]
            recalled = None
            if uses.episodic != "absent":
                recalled = self.episodic.summary(state.episodic).to(dtype)[:, None] * episodic_alive[..., None]
            decoded = self.decoder(torch.stack(layers[1:]), weighted, recalled, span.working)
        measures = {name: torch.stack([found[name] for found in gates]) for name in (gates[0] if gates else ())}
        return Reading(decoded, tuple(layers), torch.stack(after, dim=1), measures)

    def write(
        self,
        span: Span,
        reading: Reading,
        losses: Tensor | None,
        labels: Tensor | None,
        state: StreamState,
        uses: Uses,
        statistics: bool = False,
    ) -> Written:
        """The end of a span: memories of a document that has ended are emptied, then those of the last token's document
        are written.

        losses and labels [N, P] of the whole span; losses are taken without gradient. Without them nothing is written.
        The working memory of the returned state is that of `state`.
        """
        last = span.segment_ids[:, -1]
        ended = last != state.segment
        initial = self.procedural.initial_rows(state.hidden.dtype)
        procedural = reset_procedural(state.procedural, *initial, ended, lifelong=uses.lifelong)
        episodic = reset_episodic(state.episodic, ended, lifelong=uses.lifelong)
        surprise = torch.where(ended, 0, state.surprise)
        penalties: dict[str, Tensor] = {}
        measures: dict[str, Tensor] = {}
        if losses is not None and labels is not None:
            current = span.segment_ids == last[:, None]
            counted = current & (labels != IGNORED)
            nats = losses.detach().to(surprise.dtype) * counted
            surprise = nats.sum(-1) / counted.sum(-1).clamp(min=1)
            if uses.procedural == "on":
                gate = (nats / SURPRISING).clamp(0, 1)
                inputs, outputs = reading.layers[:-1], reading.layers[1:]
                procedural = self.procedural.eligibility(inputs, outputs, gate, counted, procedural)
                procedural, found = self.procedural.commit(procedural, surprise)
                penalties["procedural"] = self.procedural.penalty(procedural) * len(last)
                if statistics:
                    measures |= {
                        f"pm_{name}": x for name, x in (self.procedural.statistics(procedural) | found).items()
                    }
            if uses.episodic == "on":
                out = reading.layers[-1]
                candidates = self.episodic.candidates(span.x, span.working, out, nats, counted, episodic)
                episodic, found = self.episodic.write(candidates, episodic, surprise)
                penalties["episodic"] = self.episodic.penalty(episodic) * len(last)
                if statistics:
                    found = self.episodic.statistics(episodic) | found
                    measures |= {f"em_{name}": value for name, value in found.items()}
        after = StreamState(reading.hidden, surprise, last, state.working, procedural, episodic)
        return Written(after, penalties, measures)
