"""The whole model token by token, column by column, in plain loops over one stream.

What is written at the end of a span (commit, candidates, write) is the memories' own, which their tests compare with
hand-computed equations; everything else is computed here from the weights alone.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.batch import IGNORED
from pipeline.systems.neuromorphic.columns import ColumnFeedForward, ColumnLinear, ColumnNorm
from pipeline.systems.neuromorphic.memory.procedural import ROUTING_TEMPERATURE, USE
from pipeline.systems.neuromorphic.model.decoder import Attention, Block
from pipeline.systems.neuromorphic.model.model import NeuromorphicModel
from pipeline.systems.neuromorphic.state import ProceduralState, StreamState, Uses


def unit(x: Tensor) -> Tensor:
    return x / (x.dot(x) + 1e-8).sqrt()


def linear(module: ColumnLinear, i: int, x: Tensor) -> Tensor:
    """The map of column (or instance) i, of x [inputs]."""
    out = x @ module.weight[i]
    return out if module.bias is None else out + module.bias[i]


def shared(module, i: int, x: Tensor) -> Tensor:
    out = module.weight[i] @ x
    return out if module.bias is None else out + module.bias[i]


def normed(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * gain + shift


def norm(module: ColumnNorm, i: int, x: Tensor) -> Tensor:
    return normed(x, module.weight[i], module.bias[i])


def feed_forward(module: ColumnFeedForward, i: int, x: Tensor) -> Tensor:
    inner = normed(x, module.norm_weight[i], module.norm_bias[i]) @ module.inner_weight[i] + module.inner_bias[i]
    return x + F.gelu(inner) @ module.outer_weight[i] + module.outer_bias[i]


def attend(module: Attention, i: int, query: Tensor, keys: list[Tensor]) -> Tensor:
    width = len(query) // module.heads
    q, mixed = linear(module.query, i, query), []
    ks, vs = [linear(module.key, i, x) for x in keys], [linear(module.value, i, x) for x in keys]
    for head in range(module.heads):
        part = slice(head * width, (head + 1) * width)
        weights = torch.softmax(torch.stack([q[part].dot(k[part]) for k in ks]) / math.sqrt(width), 0)
        mixed.append(sum(w * v[part] for w, v in zip(weights, vs, strict=True)))
    return linear(module.output, i, torch.cat(mixed))


def block(module: Block, i: int, query: Tensor, keys: list[Tensor]) -> Tensor:
    if module.alone is not None:
        # Softmax over one key is 1.
        value = linear(module.alone.value, i, norm(module.alone_norm, i, query))
        query = query + linear(module.alone.output, i, value)
    query = query + attend(module.attention, i, norm(module.norm, i, query), keys)
    return feed_forward(module.feed_forward, i, query)


def turned(x: Tensor, position: int) -> Tensor:
    """RoPE as a product of complex numbers: pairs (j, j + half)."""
    half = len(x) // 2
    angles = position * 10_000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / len(x))
    product = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([product.real, product.imag])


class Reference:
    """One stream; `state` is a StreamState of one row, whose working memory is kept here as a list."""

    def __init__(self, model: NeuromorphicModel, uses: Uses) -> None:
        self.model, self.uses = model, uses
        self.state: StreamState = model.initial_state(1, torch.device("cpu"), torch.float64)
        self.seen: list[tuple[Tensor, Tensor, int]] = []
        """Key, value and document of every token."""
        self.at = 0
        self.losses: list[Tensor] = []
        self._begin()

    def _begin(self) -> None:
        self.hidden = [[self.state.hidden[0, la, b] for b in range(self.model.sizes.columns)] for la in self._layers()]
        self.eligible: ProceduralState = self.state.procedural
        self.before = int(self.state.segment)
        self.tokens: list[tuple[Tensor, Tensor, list[Tensor], int, int, Tensor]] = []
        self.outputs: list[list[list[Tensor]]] = []
        self.shares = torch.zeros_like(self.eligible.strengths)

    def _layers(self) -> range:
        return range(self.model.sizes.layers)

    def token(self, token: int, label: int, document: int, position: int) -> None:
        """Reads one token, and ends the span if it is the last of one."""
        model, sizes, uses, state = self.model, self.model.sizes, self.uses, self.state
        columns = range(sizes.columns)
        if document != self.before:
            self.hidden = [[torch.zeros_like(h) for h in row] for row in self.hidden]
        same = document == int(state.segment)
        alive = same or uses.lifelong
        surprise = state.surprise[0] if same else torch.zeros((), dtype=torch.float64)
        x = model.embedding.weight[token]
        working = self._working(x, document, position)
        episodic = [self._episodic(b, x, working, alive) for b in columns]
        level = [
            (model.column_input.weight @ x)[b * sizes.column_width : (b + 1) * sizes.column_width] for b in columns
        ]
        layers = [level]
        for la in self._layers():
            level = [self._layer(la, b, layers[-1][b], working, episodic[b], surprise, alive) for b in columns]
            layers.append(level)
        decoded = self._decode(layers[1:], working, alive)
        loss = torch.zeros((), dtype=torch.float64)
        if label != IGNORED:
            logits = model.head.weight @ decoded
            loss = logits.logsumexp(0) - logits[label]
        self.losses.append(loss)
        self._eligible(layers, loss.detach(), document, same)
        self.outputs.append(layers[1:])
        self.tokens.append((x, working, layers[-1], document, label, loss.detach()))
        self.before = document
        self.at += 1
        if self.at % model.span == 0:
            self._end()

    def _working(self, x: Tensor, document: int, position: int) -> Tensor:
        module = self.model.working
        q, k, v = module.query(x), module.key(x), module.value(x)
        width, heads = module.head_width, []
        if module.rotated:
            q, k = (torch.cat([turned(p, position) for p in y.split(width)]) for y in (q, k))
        self.seen.append((k, v, document))
        window = [(k, v) for k, v, d in self.seen[-module.window :] if d == document]
        if self.uses.working == "empty":
            window = window[-1:]
        for head in range(module.heads):
            part = slice(head * width, (head + 1) * width)
            weights = torch.softmax(torch.stack([q[part].dot(k[part]) for k, _ in window]) / math.sqrt(width), 0)
            heads.append(sum(w * v[part] for w, (_, v) in zip(weights, window, strict=True)))
        return module.output(torch.cat(heads))

    def _episodic(self, b: int, x: Tensor, working: Tensor, alive: bool) -> Tensor:
        """What the episodic memory says to column b: y_em, through W_em."""
        if self.uses.episodic == "absent":
            return torch.zeros(self.model.sizes.column_width, dtype=torch.float64)
        module, state = self.model.episodic, self.state.episodic
        width = module.width
        q, c = unit(shared(module.query, b, torch.cat([x, working]))), shared(module.context, b, x)
        there = [m for m in range(module.episodes) if state.strengths[0, b, m] > 0]
        if not alive or self.uses.episodic == "empty":
            there = []
        scale = math.sqrt(module.width)
        matches = {m: scale * q.dot(state.keys[0, b, m]) + state.strengths[0, b, m].log() for m in there}
        nearest = sorted(there, key=lambda m: -float(matches[m]))[: module.retrieved]
        y = torch.zeros(width, dtype=torch.float64)
        if nearest:
            k, v, s = (z[0, b, nearest] for z in (state.keys, state.values, state.strengths))
            y = torch.softmax(math.sqrt(width) * (k @ q) + v @ c / math.sqrt(width) + s.log(), 0) @ v
        out = linear(module.output, b, feed_forward(module.readout, b, y))
        return linear(self.model.episodic_input, b, out)

    def _layer(
        self, la: int, b: int, x: Tensor, working: Tensor, episodic: Tensor, surprise: Tensor, alive: bool
    ) -> Tensor:
        model, layer, state = self.model, self.model.layers[la], self.state.procedural
        y = torch.zeros_like(x)
        if alive and self.uses.procedural == "on":
            for i in range(state.keys.shape[3]):
                y = y + state.strengths[0, la, b, i] * state.keys[0, la, b, i].dot(unit(x)) * state.values[0, la, b, i]
        y = feed_forward(model.procedural.readout[la], b, y)
        u = torch.cat([x, y, shared(model.working_input, b, working), episodic])
        mixed = linear(layer.gates, b, u) + surprise * layer.surprise[b]
        a, new = torch.sigmoid(mixed[: len(x)]), torch.tanh(mixed[len(x) :])
        h = a * self.hidden[la][b] + ((1 - a) * new if layer.scaled else new)
        self.hidden[la][b] = h
        return feed_forward(layer.feed_forward, b, norm(layer.norm, b, linear(layer.output, b, h) + x))

    def _decode(self, layers: list[list[Tensor]], working: Tensor, alive: bool) -> Tensor:
        model, d, uses = self.model, self.model.decoder, self.uses
        said = []
        for b in range(model.sizes.columns):
            query, keys = d.summary[b], [row[b] + d.layers[b, la] for la, row in enumerate(layers)]
            for module in d.summary_blocks:
                query = block(module, b, query, keys)
            said.append(d.from_column(norm(d.summary_norm, b, query)) + d.kinds[0] + d.columns[b])
        held = alive and uses.procedural == "on"
        said.append(d.from_procedural(_mean(self.state.procedural) * held) + d.kinds[1])
        if uses.episodic != "absent":
            held = alive and uses.episodic == "on"
            said.append(d.from_episodic(_mean(self.state.episodic) * held) + d.kinds[2])
        said.append(d.from_working(working) + d.kinds[3])
        thalamic = [d.thalamic[i] for i in range(len(d.thalamic))]
        for module in d.thalamic_blocks:
            thalamic = [block(module, 0, query, said) for query in thalamic]
        thalamic = [d.thalamic_norm(x) for x in thalamic]
        top = torch.cat(layers[-1])
        query = d.query(top)
        for module in d.blocks:
            query = block(module, 0, query, thalamic)
        return top + d.output(query)

    def _eligible(self, layers: list[list[Tensor]], loss: Tensor, document: int, same: bool) -> None:
        """e <- rho c e + g norm(W_k x), routed to slots; c = 0 at a document's first token."""
        if self.uses.procedural != "on":
            return
        module, config, state = self.model.procedural, self.model.config, self.eligible
        held = self.state.procedural
        if not same and not self.uses.lifelong:
            held = module.initial_state(1, torch.float64)
        keys, values = state.eligible_keys.clone(), state.eligible_values.clone()
        if document != self.before:
            keys, values = torch.zeros_like(keys), torch.zeros_like(values)
            self.shares = torch.zeros_like(self.shares)
        gate = min(max(float(loss) / 5, 0.0), 1.0)
        for la in self._layers():
            for b in range(self.model.sizes.columns):
                i = la * self.model.sizes.columns + b
                k, v = unit(linear(module.key, i, layers[la][b])), linear(module.value, i, layers[la + 1][b])
                scores = (held.keys[0, la, b] @ k - USE * held.strengths[0, la, b]) / ROUTING_TEMPERATURE
                share = torch.ones_like(scores) if config.as_published else torch.softmax(scores, 0)
                rho = config.eligibility_decay
                keys[0, la, b] = rho * keys[0, la, b] + gate * share[:, None] * k
                values[0, la, b] = rho * values[0, la, b] + gate * share[:, None] * v
                self.shares[0, la, b] = rho * self.shares[0, la, b] + gate * share
        self.eligible = dataclasses.replace(state, eligible_keys=keys, eligible_values=values)

    def _end(self) -> None:
        model, uses, last = self.model, self.uses, self.before
        ended = last != int(self.state.segment)
        procedural, episodic = self.eligible, self.state.episodic
        if ended and not uses.lifelong:
            fresh = model.initial_state(1, torch.device("cpu"), torch.float64)
            eligible = {name: getattr(procedural, name) for name in ("eligible_keys", "eligible_values")}
            procedural, episodic = dataclasses.replace(fresh.procedural, **eligible), fresh.episodic
        xs, workings, tops, documents, labels, losses = zip(*self.tokens, strict=True)
        counted = torch.tensor([[d == last and n != IGNORED for d, n in zip(documents, labels, strict=True)]])
        nats = torch.stack(losses)[None] * counted
        surprise = nats.sum(1) / counted.sum(1).clamp(min=1)
        if uses.procedural == "on":
            if counted.any() and not model.config.as_published:
                procedural = self._without_mean(procedural, counted[0])
            procedural, _ = model.procedural.commit(procedural, surprise)
        if uses.episodic == "on":
            outputs = torch.stack([torch.stack(top) for top in tops], 1)[:, None]
            x, working = torch.stack(xs)[None], torch.stack(workings)[None]
            candidates = model.episodic.candidates(x, working, outputs, nats, counted, episodic)
            episodic, _ = model.episodic.write(candidates, episodic, surprise)
        hidden = torch.stack([torch.stack(row) for row in self.hidden])[None]
        self.state = StreamState(hidden, surprise, torch.tensor([last]), None, procedural, episodic)
        self._begin()

    def _without_mean(self, procedural: ProceduralState, counted: Tensor) -> ProceduralState:
        """What is eligible without W_v of the mean output of the counted tokens, in the shares that tokens have."""
        values, columns = procedural.eligible_values.clone(), self.model.sizes.columns
        for la in self._layers():
            for b in range(columns):
                said = torch.stack([outputs[la][b] for outputs, n in zip(self.outputs, counted, strict=True) if n])
                module, i = self.model.procedural.value, la * columns + b
                common = linear(module, i, said.mean(0)) - module.bias[i]
                values[0, la, b] -= self.shares[0, la, b][:, None] * common
        return dataclasses.replace(procedural, eligible_values=values)


def _mean(state) -> Tensor:
    """Of the first row: the strength-weighted mean of the values, averaged over instances."""
    values, strengths = state.values[0].flatten(0, -3), state.strengths[0].flatten(0, -2)
    means = [
        sum(s * v for s, v in zip(ss, vs, strict=True)) / max(float(ss.sum()), 1e-8)
        for ss, vs in zip(strengths, values, strict=True)
    ]
    return torch.stack(means).mean(0)
