"""Held-out evaluation: perplexity by position and recall by distance, with the memory on and off."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig

from pipeline.lm.attention import window_edges
from pipeline.lm.held_out import Modes
from pipeline.lm.long_recall import DISTANCES, QUERIES, evaluate_capacity, evaluate_long_recall
from pipeline.lm.long_text import LENGTHS, ReadsText, evaluate_long_text
from pipeline.lm.passages import repeated_passages
from pipeline.lm.perplexity import evaluate_perplexity
from pipeline.lm.recall import evaluate_recall
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation, Phase
from pipeline.systems.miras.config import MemoryConfig, MirasConfig

ON, OFF = "memory on", "memory off"
RATIO = "memory off / on"
"""Series of the curves."""


class EvaluatedMiras(ReadsText, Protocol):
    """What an evaluation of this system asks of it."""

    sizes: MirasConfig
    backbone: PreTrainedConfig


def evaluation_modes(memory: MemoryConfig) -> Modes:
    """The model with its memory, and without one where it has any."""
    return {ON: {"memory": True}, **({OFF: {"memory": False}} if memory.layers else {})}


@torch.no_grad()
def recall_suite(
    system: EvaluatedMiras,
    model: nn.Module,
    sync_point: SyncPoint,
    *,
    lengths: tuple[int, ...] | None = None,
    queries: int = QUERIES,
) -> Evaluation:
    """`eval --suite recall`: of the recall task by distance and by pairs, of text by task, length and depth.

    `lengths`: in tokens; None: those that stand by default. Raises UserError for one that is too short. Collective.
    """
    modes, task = evaluation_modes(system.sizes.memory), system.config.data.recall
    edges = window_edges(system.sizes.attention, system.backbone.num_hidden_layers)
    was_training = model.training
    model.eval()
    try:
        if task is None:
            return evaluate_long_text(
                system, model, sync_point, modes, lengths=lengths or LENGTHS, documents=queries, edges=edges
            )
        found = evaluate_long_recall(
            system, model, sync_point, modes, task, edges=edges, distances=lengths or DISTANCES, queries=queries
        )
        memory = system.sizes.memory
        dims = {f"{memory.head_dim}, a head's key size": float(memory.head_dim)} if memory.layers else {}
        capacity = evaluate_capacity(system, model, sync_point, modes, task, edges=dims, queries=queries)
        return Evaluation({**found.scalars, **capacity.scalars}, {**found.curves, **capacity.curves})
    finally:
        model.train(was_training)


@torch.no_grad()
def evaluate(system: EvaluatedMiras, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Evaluation:
    """Held-out loss and curves; the same held-out rows every time. Leaves the model's mode as it found it."""
    was_training = model.training
    model.eval()
    try:
        return _evaluate(system, model, phase, sync_point)
    finally:
        model.train(was_training)


def _evaluate(system: EvaluatedMiras, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Evaluation:
    modes, task = evaluation_modes(system.sizes.memory), system.config.data.recall
    edges = window_edges(system.sizes.attention, system.backbone.num_hidden_layers)
    if task is not None and task.spread == "log":
        # What is trained on, and four times as far.
        distances = sorted({max(task.least_gap, task.pairs + 2), task.max_gap, 4 * task.max_gap})
        return evaluate_long_recall(system, model, sync_point, modes, task, edges=edges, distances=distances)
    if task is not None:
        return evaluate_recall(system, model, phase, sync_point, modes, task, edges=edges)
    ratios = {RATIO: (OFF, ON)} if OFF in modes else {}
    found = evaluate_perplexity(system, model, phase, sync_point, modes, edges=edges, ratios=ratios)
    repeated = repeated_passages(system, model, phase, sync_point, modes, edges=edges)
    if repeated is None:
        return found
    return dataclasses.replace(found, curves={**found.curves, "recall_by_distance": repeated})
