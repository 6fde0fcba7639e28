"""Held-out evaluation: perplexity by position and recall by distance, with the memory on, emptied and off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig

from pipeline.data.text_tasks import FORMS
from pipeline.errors import UserError
from pipeline.lm.attention import window_edges
from pipeline.lm.decoder_config import kv_width, sliding_window
from pipeline.lm.gap_closed import GapModes, measure_gap
from pipeline.lm.held_out import Modes
from pipeline.lm.held_out_files import EvaluatedByFile, evaluate_files
from pipeline.lm.long_recall import DISTANCES, QUERIES, evaluate_capacity, evaluate_long_recall
from pipeline.lm.long_text import LENGTHS, ReadsText, evaluate_long_text
from pipeline.lm.passages import repeated_passages
from pipeline.lm.perplexity import evaluate_perplexity
from pipeline.lm.pretrained import trained_length
from pipeline.lm.recall import evaluate_recall
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation, Phase
from pipeline.systems.miras.config import MirasConfig
from pipeline.systems.miras.emptied import WITHOUT, emptied_options, is_state
from pipeline.systems.miras.layer_kinds import by_layer

ON, OFF, EMPTIED, FULL = "memory on", "memory off", "memory emptied", "full attention"
RATIO, EMPTIED_RATIO = "memory off / on", "memory emptied / on"
"""Series of the curves."""
QUESTION = 256
"""Tokens that a question about a text has at the most."""


class EvaluatedMiras(ReadsText, EvaluatedByFile, Protocol):
    """What an evaluation of this system asks of it."""

    sizes: MirasConfig
    backbone: PreTrainedConfig


def evaluation_modes(system: EvaluatedMiras) -> Modes:
    """The model with its memory, and where it has any: without one, and with nothing in it from beyond the window."""
    if not system.sizes.memory.layers:
        return {ON: {"memory": True}}
    return {ON: {"memory": True}, OFF: WITHOUT, EMPTIED: _emptied(system)}


def _emptied(system: EvaluatedMiras) -> Mapping[str, Any]:
    return emptied_options(by_layer(system.sizes.memory, system.backbone).values())


@torch.no_grad()
def recall_suite(
    system: EvaluatedMiras,
    model: nn.Module,
    sync_point: SyncPoint,
    *,
    lengths: tuple[int, ...] | None = None,
    queries: int = QUERIES,
    forms: Sequence[str] | None = None,
) -> Evaluation:
    """`eval --suite recall`: of the recall task by distance and by pairs, of text by task, length and depth.

    `lengths`: in tokens; `forms`: of the questions about text; None: all that stand by default. Raises UserError for a
    length that is too short, and for forms where there is no text. Collective.
    """
    modes, task = evaluation_modes(system), system.config.data.recall
    edges = window_edges(system.sizes.attention, system.backbone.num_hidden_layers)
    was_training = model.training
    model.eval()
    try:
        if task is None:
            lengths = lengths or LENGTHS
            if (full := full_attention(system)) is not None:
                # A question that the backbone cannot answer to what it sees says nothing about its memory.
                modes = {**modes, FULL: full(max(lengths) + QUESTION)}
            return evaluate_long_text(
                system, model, sync_point, modes,
                lengths=lengths, documents=queries, forms=forms or FORMS, edges=edges,
            )  # fmt: skip
        if forms is not None:
            raise UserError(f"--forms {','.join(forms)}: {system.config.recipe} has pairs, and no text: leave it out")
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
        found = _evaluate(system, model, phase, sync_point)
    finally:
        model.train(was_training)
    files = evaluate_files(system, model, sync_point)
    return dataclasses.replace(found, scalars={**found.scalars, **files.scalars})


def _evaluate(system: EvaluatedMiras, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Evaluation:
    modes, task = evaluation_modes(system), system.config.data.recall
    edges = window_edges(system.sizes.attention, system.backbone.num_hidden_layers)
    if task is not None and task.spread == "log":
        # What is trained on, and four times as far.
        distances = sorted({max(task.least_gap, task.pairs + 2), task.max_gap, 4 * task.max_gap})
        return evaluate_long_recall(system, model, sync_point, modes, task, edges=edges, distances=distances)
    if task is not None:
        return evaluate_recall(system, model, phase, sync_point, modes, task, edges=edges)
    ratios = {RATIO: (OFF, ON), EMPTIED_RATIO: (EMPTIED, ON)} if OFF in modes else {}
    found = evaluate_perplexity(system, model, phase, sync_point, modes, edges=edges, ratios=ratios)
    repeated = repeated_passages(system, model, phase, sync_point, modes, edges=edges)
    if repeated is None:
        return found
    return dataclasses.replace(found, curves={**found.curves, "recall_by_distance": repeated})


def check_gap(system: EvaluatedMiras, topology: Topology) -> None:
    """Raises UserError where there is no gap to close: without a memory, without a window, or with one that the ranks
    of a sequence, or chunks of slots, cannot share."""
    attention, degree = system.sizes.attention, topology.sequence
    if not system.sizes.memory.layers:
        raise UserError("gap closed: this model has no memory: give --model.memory.layers")
    if attention.kind == "full":
        raise UserError("--model.attention.kind full: nothing lies beyond a window: give --model.attention.kind window")
    if attention.window % degree:
        raise UserError(
            f"--parallel.sequence {degree} does not divide the --model.attention.window {attention.window}, in steps of"
            " which memories are swapped for gap closed: choose a degree that does"
        )
    for kind in by_layer(system.sizes.memory, system.backbone).values():
        if kind.attachment == "slots" and attention.window % kind.slots.chunk:
            raise UserError(
                f"--model.memory.slots.chunk {kind.slots.chunk} does not divide the --model.attention.window"
                f" {attention.window}, in steps of which slots are swapped for gap closed: give a chunk that does"
            )


def gap_modes(system: EvaluatedMiras) -> GapModes:
    """How the losses of a memory are measured."""
    attention = system.sizes.attention
    return GapModes(
        attention.window,
        window=WITHOUT,
        memory={"memory": True},
        emptied=_emptied(system),
        full=full_attention(system),
        reach=full_length(system),
        is_state=is_state,
        equal={
            "memory": False,
            "attention": dataclasses.replace(attention, window=attention.window + state_tokens(system)),
        },
    )


def full_attention(system: EvaluatedMiras) -> Callable[[int], Mapping[str, Any]] | None:
    """The options of full attention without memory, of the longest document's tokens; None where the backbone was
    trained at no more than the window."""
    attention, length = system.sizes.attention, full_length(system)
    if length <= attention.window:
        return None

    def full(longest: int) -> Mapping[str, Any]:
        # A window and sinks that reach as far together see the whole of what is no longer: full attention, across
        # steps. Beyond, the window keeps the backbone at distances that it was trained with.
        window = max(1, min(length - attention.sinks, longest))
        return {"memory": False, "attention": dataclasses.replace(attention, window=window)}

    return full


def state_tokens(system: EvaluatedMiras) -> int:
    """Tokens whose keys and values, in all layers, are as many numbers as the states of all memories: rounded up."""
    numbers = 0
    for kind in by_layer(system.sizes.memory, system.backbone).values():
        if kind.attachment == "slots":
            numbers += 2 * kv_width(system.backbone) * (kind.slots.count + kind.slots.chunk)
        else:
            numbers += (1 + kind.has_momentum) * kind.heads * kind.state_rows * kind.head_dim
    return -(-numbers // (system.backbone.num_hidden_layers * 2 * kv_width(system.backbone)))


def full_length(system: EvaluatedMiras) -> int:
    """Tokens that the backbone was trained to see with full attention: those of a pretrained one by its config, or
    `--evaluation.full-length`, at most; 0 where there are none, as of random weights that are trained with the
    window."""
    given = system.config.evaluation.full_length
    limits = (trained_length(system.sizes.backbone), sliding_window(system.backbone))
    known = [limit for limit in limits if limit is not None] if system.sizes.backbone.pretrained is not None else []
    return min([given, *known]) if given else min(known, default=0)


@torch.no_grad()
def gap_closed(system: EvaluatedMiras, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Evaluation:
    """The losses (`pipeline/lm/gap_closed.py`). Raises UserError as `check_gap`; leaves the model's mode."""
    check_gap(system, sync_point.topology)
    was_training = model.training
    model.eval()
    try:
        return measure_gap(system, model, phase, sync_point, gap_modes(system))
    finally:
        model.train(was_training)
