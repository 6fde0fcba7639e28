"""Whether the memories are used: a small model learns to answer questions about facts that its window no longer sees.

Phase A: one fact, which procedural memory alone holds. Phase B: facts asked for in the document that tells them. Phase
C, from there: also in later documents, with memories that outlive documents. The facts, their layout and distances are
those of `pipeline.systems.neuromorphic.facts`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from pipeline.data.batch import IGNORED
from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.facts import FactsConfig, FactsLoader
from pipeline.systems.neuromorphic.model.model import NeuromorphicModel
from pipeline.systems.neuromorphic.state import EpisodicState, ProceduralState, StreamState, Uses
from pipeline.systems.neuromorphic.weights import initialise, is_vector

Memory = TypeVar("Memory", ProceduralState, EpisodicState)
SPAN = WINDOW = 16
LENGTH = 64
"""Tokens of a step: four spans, through which gradients reach what was written."""
ONE = FactsConfig(keys=64, values=16, fillers=8, facts=1, within=1, least_distance=20, least_tokens=28, most_tokens=40)
"""What the memory says is learned from one fact: where it is alone, whatever is read is about it."""
WITHIN = dataclasses.replace(ONE, facts=3, within=3, least_tokens=40, most_tokens=52)
LATER = dataclasses.replace(WITHIN, facts=4, within=2, documents=2)
PHASE_A = Uses(episodic="absent")

RESTART = 16
"""Steps after which new streams begin."""
PENALTY = 0.01
"""Weight of strengths above .9 of their budget."""


def config(**sizes: Any) -> NeuromorphicConfig:
    """The tiny tier's, smaller but for the episodes."""
    small = {"width": 64, "decoder_width": 32, "episodes": 128, "episodic_width": 64}
    return NeuromorphicConfig(tier="tiny", vocab=ONE.vocab, span=SPAN, window=WINDOW, **(small | sizes))


def new_model(sizes: NeuromorphicConfig, seed: int = 0) -> NeuromorphicModel:
    model = NeuromorphicModel(sizes)
    initialise(model, seed)
    return model


def train(
    model: NeuromorphicModel,
    task: FactsConfig,
    uses: Uses,
    *,
    most: int,
    enough: float = 1.1,
    batch: int = 32,
    peak: float = 3e-3,
    warm_up: int = 50,
    seed: int = 0,
    restart: int = RESTART,
    told: Callable[[str], None] = print,
) -> tuple[StreamState, int]:
    """Trains on the facts for `most` steps, or until the share of right answers in the last 50 is `enough`. State and
    steps at the end. Every `restart` steps new streams begin: a memory that has long been full is not all there is."""
    groups = [
        {"params": [p for name, p in model.named_parameters() if is_vector(name) is vector], "weight_decay": decay}
        for vector, decay in ((True, 0.0), (False, 0.01))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    begun, answers = time.monotonic(), []
    for step in range(1, most + 1):
        if step % restart == 1:
            loader = FactsLoader(task, sequence_length=LENGTH, batch_size=batch, seed=seed + step)
            state = model.initial_state(batch, torch.device("cpu"))
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, step / warm_up)
        data = loader.next_step()[0]
        out = model(data.input_ids, data.labels, data.segment_ids, data.positions, state, uses, predict=True)
        assert out.losses is not None
        counted = (data.labels != IGNORED).sum()
        loss = out.losses.sum() / counted + PENALTY * sum(out.penalties.values()) / batch
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = detached(out.state)
        asked = data.documents >= 0
        answers.append(
            torch.stack([(out.predictions == data.labels)[asked].float().mean(), out.losses.detach()[asked].mean()])
        )
        if step % 50 == 0:
            right, nats = torch.stack(answers[-50:]).mean(0).tolist()
            told(f"step {step}: {time.monotonic() - begun:.0f} s, right {right:.3f}, {nats:.3f} nats an answer")
            if right >= enough:
                break
    return state, step


def detached(state: StreamState) -> StreamState:
    """Without graph, part by part."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach()
        if isinstance(value, tuple):
            return type(value)(*map(plain, value))
        if dataclasses.is_dataclass(value):
            return detached(value)
        return value

    return dataclasses.replace(
        state, **{item.name: plain(getattr(state, item.name)) for item in dataclasses.fields(state)}
    )


@torch.no_grad()
def right_answers(
    model: NeuromorphicModel,
    task: FactsConfig,
    uses: Uses,
    *,
    tokens: int = 512,
    rows: int = 32,
    swapped: Literal["procedural", "episodic"] | None = None,
) -> tuple[float, float]:
    """Share of right answers about facts of the same document and of earlier ones (nan where none is asked for), in
    held-out text behind its first 64 tokens. swapped: at every span, each stream gets this memory of another one."""
    length = SPAN if swapped else LENGTH
    loader = FactsLoader(task, sequence_length=length, batch_size=rows, seed=1, held_out=True)
    state = model.initial_state(rows, torch.device("cpu"))
    right, asked = torch.zeros(2), torch.zeros(2)
    for begun in range(0, tokens, length):
        data = loader.next_step()[0]
        if swapped:
            state = dataclasses.replace(state, **{swapped: rolled(getattr(state, swapped))})
        out = model(data.input_ids, data.labels, data.segment_ids, data.positions, state, uses, predict=True)
        state = out.state
        for index, about in enumerate((data.documents == 0, data.documents > 0)):
            if begun >= LENGTH:
                right[index] += (out.predictions == data.labels)[about].sum()
                asked[index] += about.sum()
    within, later = (right / asked).tolist()
    return within, later


def rolled(memory: Memory) -> Memory:
    """A memory whose rows are those of the next stream."""
    return dataclasses.replace(memory, **{name: rows.roll(1, 0) for name, rows in vars(memory).items()})


def similarity(rows: Tensor, strengths: Tensor) -> float:
    """Mean cosine of pairs of written rows of an instance: rows [..., slots, width], strengths [..., slots]."""
    rows, there = nn.functional.normalize(rows, dim=-1), (strengths > 1e-4).to(rows.dtype)
    pairs = there.unsqueeze(-1) * there.unsqueeze(-2) * (1 - torch.eye(rows.shape[-2]))
    return float((rows @ rows.transpose(-1, -2) * pairs).sum() / pairs.sum())


def similarities(state: StreamState) -> dict[str, float]:
    memories: dict[str, ProceduralState | EpisodicState] = {"pm": state.procedural, "em": state.episodic}
    return {
        f"{name} {part}": similarity(getattr(memory, part), memory.strengths)
        for name, memory in memories.items()
        for part in ("keys", "values")
    }
