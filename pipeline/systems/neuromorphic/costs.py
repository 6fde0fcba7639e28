"""What the model costs: FLOPs of a token by part, and what a training step holds beside weights and optimizer."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from pipeline.ops.cross_entropy import tile_of
from pipeline.system import Flops
from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.model.model import NeuromorphicModel
from pipeline.systems.neuromorphic.weights import is_vector, part_of

EPISODIC = "episodic memory"


def part_flops(config: NeuromorphicConfig) -> dict[str, float]:
    """Of one token forward, by the parts of `weights.PARTS`: two for every multiply-add of a matrix product, those with
    the rows of memories included. The working memory's window is full, as it is in a long document."""
    sizes = config.sizes
    flops: dict[str, float] = {}
    for name, elements in _matrices(config).items():
        part = part_of(name)
        flops[part] = flops.get(part, 0.0) + 2 * elements * _applications(name, config)
    instances, width, slots = sizes.layers * sizes.columns, sizes.column_width, sizes.slots
    flops["working memory"] += 4 * sizes.working_width * sizes.window
    # Scores and values of a read; the routes of what is eligible, and the sums of keys and values by slot.
    flops["procedural memory"] += instances * slots * width * (4 + 2 + 4)
    # Cosines, the context's scores and the values of a read; the nearest episode of a candidate.
    flops[EPISODIC] += 2 * 4 * sizes.columns * sizes.episodes * sizes.episodic_width
    if config.decoder:
        keys = sizes.columns * sizes.layers * width * 2  # of the summaries' two layers
        keys += sizes.thalamic_tokens * (sizes.columns + 3) * sizes.decoder_width * 2
        keys += sizes.thalamic_tokens * sizes.decoder_width * sizes.decoder_layers
        flops["decoder"] += 4 * keys
    return flops


def flops(config: NeuromorphicConfig, phase: str | None = None) -> Flops:
    """Of one token in training in phase A, B or C; None: B or C. Four for every two of the forward pass go backward."""
    forward = sum(value for part, value in part_flops(config).items() if phase != "A" or part != EPISODIC)
    return Flops(forward, 2 * forward)


def activation_bytes(
    config: NeuromorphicConfig,
    rows: int,
    tokens: int,
    element: int,
    *,
    phase: str | None = None,
    recompute: bool = False,
) -> dict[str, int]:
    """Estimate of what a step of `rows` streams and `tokens` tokens holds at `element` bytes a number.

    Fitted to what autograd saves of small models of 22 sizes, of which it is within 15 %. With `recompute` the layers'
    outputs are kept alone, and all of one span at a time.
    """
    sizes, span = config.sizes, config.span
    spans = -(-tokens // span)
    instance, slots = sizes.layers * sizes.width, sizes.layers * sizes.columns * sizes.slots
    per_token = instance * (25 * element + 5 * 4) + 2.3 * slots * element + 27 * sizes.width * element
    if config.decoder:
        per_token += 12 * sizes.decoder_width * (2 * sizes.thalamic_tokens + sizes.decoder_layers) * element
        per_token += 5 * sizes.decoder_width * (sizes.columns + 3) * element
    else:
        # The summaries of the columns, which the terms of layers and width have in them.
        per_token -= (7.5 * instance + 17 * sizes.width) * element
    per_span = 4.0 * 11 * slots * sizes.column_width
    if phase != "A":
        scores = sizes.columns * sizes.episodes
        per_token += (scores + 14 * sizes.columns * sizes.episodic_width + 9 * sizes.width) * element
        per_span += 4.0 * scores * (3.6 * sizes.episodic_width + 21 * sizes.candidates)
    outputs = (instance + sizes.width) * element
    one_span = rows * (span * per_token + per_span)
    whole = {
        "kept activations": rows * tokens * outputs + one_span if recompute else spans * one_span,
        "state of the streams": 4 * rows * state_numbers(config),
        # The head's weight has a float32 gradient of its own for every span, and a tile of logits.
        "head": spans * 4 * config.vocab * sizes.width + 3 * 4 * config.vocab * min(rows * span, tile_of(config.vocab)),
    }
    return {name: int(value) for name, value in whole.items()}


def state_numbers(config: NeuromorphicConfig) -> int:
    """Numbers that a stream carries: procedural memory, episodic memory, the working memory's window, h."""
    sizes = config.sizes
    width = sizes.column_width
    procedural = sizes.layers * sizes.columns * sizes.slots * (4 * width + 1)
    episodic = sizes.columns * sizes.episodes * (2 * sizes.episodic_width + 1)
    return procedural + episodic + sizes.window * (2 * sizes.working_width + 4) + sizes.layers * sizes.width


@functools.cache
def _matrices(config: NeuromorphicConfig) -> Mapping[str, int]:
    with torch.device("meta"):
        model = NeuromorphicModel(config)
    return {name: parameter.numel() for name, parameter in model.named_parameters() if not is_vector(name)}


def _applications(name: str, config: NeuromorphicConfig) -> float:
    """How often a matrix is applied for one token."""
    sizes = config.sizes
    if name == "embedding.weight":
        return 0
    if ".neuromodulator." in name:
        return 1 / config.span
    if name == "episodic.value.weight":
        return min(1.0, sizes.candidates / config.span)
    if name.startswith("decoder.from_column."):
        return sizes.columns
    of_keys = ".attention.key." in name or ".attention.value." in name
    queries, keys = 1, 1
    if name.startswith("decoder.summary_blocks."):
        keys = sizes.layers
    elif name.startswith("decoder.thalamic_blocks."):
        queries, keys = sizes.thalamic_tokens, sizes.columns + 3
    elif name.startswith("decoder.blocks."):
        keys = sizes.thalamic_tokens
    return keys if of_keys else queries
