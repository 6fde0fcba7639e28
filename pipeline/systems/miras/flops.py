"""Model FLOPs per token: causal attention at its mean reach, recomputation not counted."""

from __future__ import annotations

import math

from transformers import PreTrainedConfig

from pipeline.lm.decoder_config import attention_width, head_dim, kv_heads
from pipeline.lm.flops import attention_flops, block_flops, causal_reach, head_flops
from pipeline.lm.pretrained import trained_length
from pipeline.ops import dual_scan
from pipeline.system import Flops
from pipeline.systems.miras.config import MemoryConfig, MirasConfig
from pipeline.systems.miras.layer_kinds import by_layer, on_backbone


def compared_share(config: MirasConfig, sequence_length: int) -> float:
    """Share of tokens that a teacher is compared at when documents are as long as they can be."""
    trained = trained_length(config.backbone)
    seen = sequence_length if trained is None else min(sequence_length, trained)
    beyond = max(0, seen - config.attention.window)
    return (min(config.distillation.tokens, beyond) if config.distillation.tokens else beyond) / sequence_length


def attention_reach(config: MirasConfig, sequence_length: int) -> float:
    """Mean number of keys that a query meets when documents are as long as they can be."""
    attention = config.attention
    if attention.kind == "full":
        return causal_reach(sequence_length)
    return float(attention.window + attention.sinks)


def count_flops(config: MirasConfig, backbone: PreTrainedConfig, sequence_length: int) -> Flops:
    """Forward and backward model FLOPs per token.

    Counted as in `pipeline/lm/flops.py`. A frozen matrix has an input gradient and no weight gradient, and what comes
    before the first memory has no backward pass at all. A scan costs about twice its forward pass backward. A teacher
    costs its forward pass, and at the compared tokens the head of both.
    """
    width, inner = backbone.hidden_size, attention_width(backbone)
    matrices = block_flops(backbone)
    attention = attention_flops(backbone, attention_reach(config, sequence_length))
    head = head_flops(backbone)
    by_number = by_layer(on_backbone(config, backbone).memory, backbone)
    memories = sum(
        slot_flops(kind, backbone)
        if kind.attachment == "slots"
        else branch_flops(kind, width, head_dim(backbone)) + kind.heads * scan_flops(kind)
        for kind in by_number.values()
    )
    forward = backbone.num_hidden_layers * (matrices + attention) + head + memories
    compared = compared_share(config, sequence_length)
    if config.backbone.trainable:
        backward = 2 * forward
    elif by_number:
        first = min(by_number)
        above = backbone.num_hidden_layers - 1 - first
        backward = above * (matrices + 2 * attention) + head + 2 * memories
        # Of the first memory's own block: nothing beside it, all of it behind it, and what comes after attention.
        if by_number[first].attachment == "mal":
            backward += matrices + 2 * attention
        elif by_number[first].attachment in ("mag", "mac", "overflow", "slots"):
            backward += 2.0 * (inner * width + 3 * width * backbone.intermediate_size)
    else:
        backward = 0.0
    if config.distil == "full":
        settings, last = config.distillation, backbone.num_hidden_layers
        # The student's head is asked for all labels, for the compared tokens, or both.
        asked = (settings.cross_entropy > 0) + (settings.kl > 0) * compared
        if not settings.kl:
            # The teacher ends with the last memory's layer, and without a head so does the backward pass.
            last = max(by_number) + 1
            if not settings.cross_entropy:
                backward -= (backbone.num_hidden_layers - last) * (matrices + 2 * attention)
        backward += (asked - 1) * head
        first = min(by_number) if settings.lower_layers == "window" else 0
        teacher = (last - first) * (matrices + 2.0 * inner * (sequence_length + 1))
        forward += (asked - 1) * head + teacher + (settings.kl > 0) * compared * head
    return Flops(forward, backward)


def branch_flops(memory: MemoryConfig, width: int, attention_dim: int) -> float:
    """Of a memory branch per token, forward, its scan left out; attention_dim is the size of an attention head.

    `mac` (docs/attachments.md) reads before its segment, attends to the reads of half a segment and the persistent
    pairs, writes from two vectors of attention, and gates attention's output. `overflow` maps attention's own queries
    and keys, and has two logits per head.
    """
    heads, dim = memory.heads, memory.head_dim
    if memory.attachment == "overflow":
        return 4.0 * heads * (width + dim**2)
    if memory.attachment != "mac":
        inner = heads * dim
        return 2.0 * (
            4 * width * inner + 2 * width * heads + memory.gate_rank * (width + inner) + 2 * memory.persistent * inner
        )
    # A memory that reads something when empty is read twice, to take that off.
    reads = 2 if memory.rule in ("memora", "mlp", "swiglu") else 1
    read = 2.0 * reads * memory.state_rows * dim
    context = 4 * dim * attention_dim + 4 * attention_dim * (memory.persistent + (memory.context + 1) / 2)
    return 2.0 * width * heads * (dim + 3) + heads * (read + context + 14.0 * attention_dim * dim)


def slot_flops(memory: MemoryConfig, backbone: PreTrainedConfig) -> float:
    """Of slots per token, forward: the logits' shift; per chunk, the maps of all slots' keys and values and the
    distances between two halves of slots and new tokens; attention to the slots and to half a chunk more than the
    window."""
    heads, dim, slots, chunk = memory.heads, memory.head_dim, memory.slots.count, memory.slots.chunk
    shift = 2.0 * heads * (backbone.hidden_size + dim)
    by_chunk = kv_heads(backbone) * dim * (4.0 * slots * dim + 2 * ((slots + chunk) / 2) ** 2)
    return shift + by_chunk / chunk + 4.0 * heads * dim * (slots + (chunk + 1) / 2)


def scan_flops(memory: MemoryConfig) -> float:
    """Of one head's scan, per token, forward.

    Exact rules: 12 d^2 + 8 C d + C^2. Chunk-start rules with J states: a product of d x d for the error, one per state
    to read and one to write, and 4 C d within the chunk; with a link, memories are made token by token from blocks of
    them. Deep memories likewise with d F for d^2 per layer; they read once more, as an empty memory.
    """
    dim, hidden, states = memory.head_dim, memory.hidden, 2 if memory.has_momentum else 1
    # mac scans a segment at a time.
    longest = memory.context if memory.attachment == "mac" else math.inf
    if memory.chunk_start is None:
        chunk = min(memory.chunk, longest)
        return 12.0 * dim**2 + 8 * chunk * dim + chunk**2
    chunk = int(min(memory.chunk_start, longest))
    if memory.rule == "yaad":
        return (2.0 + 4 * states) * dim**2 + 4 * chunk * dim
    if memory.rule in ("moneta", "memora"):
        block = dual_scan.block_tokens(1, dim, dim, chunk=chunk, device_type="cuda")
        return (4.0 + 4 * states + 2 * block) * dim**2
    if memory.rule == "mlp":
        return (14.0 + 8 * states) * dim * hidden + 4 * chunk * (dim + hidden)
    assert memory.rule == "swiglu"
    short, long = sorted((dim, hidden))
    orthogonal = 3 * 5 * (4 * short**2 * long + 2 * short**3) / chunk if memory.swiglu.muon else 0.0
    return 24.0 * dim * hidden + orthogonal
