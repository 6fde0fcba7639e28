"""A small model that is trained on facts in a loop of its own, and how alike the rows are that its memories hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.batch import IGNORED
from pipeline.recipes.neuromorphic import neuromorphic_facts
from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.facts import FactsLoader
from pipeline.systems.neuromorphic.model.model import NeuromorphicModel
from pipeline.systems.neuromorphic.state import EpisodicState, ProceduralState, StreamState, Uses
from pipeline.systems.neuromorphic.weights import initialise, is_vector


def trained_on_facts(uses: Uses, phase: str, *, steps: int, batch: int) -> tuple[StreamState, NeuromorphicConfig]:
    """The state of streams that have read the facts of a phase in `steps` steps, with the settings of
    `neuromorphic_facts`; and its sizes."""
    run = neuromorphic_facts()
    assert isinstance(run.model, NeuromorphicConfig) and run.model.facts is not None
    task = run.model.facts.of_phase(phase)
    sizes = dataclasses.replace(run.model, vocab=task.vocab)
    model = NeuromorphicModel(sizes)
    initialise(model, 0)
    groups = [
        {"params": [p for name, p in model.named_parameters() if is_vector(name) is vector], "weight_decay": decay}
        for vector, decay in ((True, 0.0), (False, run.weight_decay))
    ]
    optimizer = torch.optim.AdamW(groups, betas=run.optimizer.betas)
    loader = FactsLoader(task, sequence_length=run.sequence_length, batch_size=batch)
    state = model.initial_state(batch, torch.device("cpu"))
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = run.lr * min(1, step / run.warmup_steps)
        (data,) = loader.next_step()
        out = model(data.input_ids, data.labels, data.segment_ids, data.positions, state, uses)
        assert out.losses is not None
        penalty = sizes.strength_penalty * sum(out.penalties.values()) / batch
        loss = out.losses.sum() / (data.labels != IGNORED).sum() + penalty
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        optimizer.step()
        state = detached(out.state)
    return state, sizes


def detached(state: StreamState) -> StreamState:
    """Without graph, part by part."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach()
        if isinstance(value, tuple):
            return type(value)(*map(plain, value))
        if dataclasses.is_dataclass(value):
            return detached(value)  # type: ignore[arg-type]
        return value

    return dataclasses.replace(
        state, **{item.name: plain(getattr(state, item.name)) for item in dataclasses.fields(state)}
    )


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
