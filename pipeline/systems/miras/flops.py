"""Model FLOPs per token: causal attention at its mean reach, recomputation not counted."""

from __future__ import annotations

from transformers import Olmo2Config

from pipeline.system import Flops
from pipeline.systems.miras.config import MirasConfig


def attention_reach(config: MirasConfig, sequence_length: int) -> float:
    """Mean number of keys that a query meets when documents are as long as they can be."""
    attention = config.attention
    if attention.kind == "full":
        return (sequence_length + 1) / 2
    return float(attention.window + attention.sinks)


def count_flops(config: MirasConfig, backbone: Olmo2Config, sequence_length: int) -> Flops:
    """Forward and backward model FLOPs per token.

    A multiply-add is two FLOPs. A frozen matrix has an input gradient and no weight gradient, and blocks up to the
    first memory layer have no backward pass at all. The scan follows the exact chunked rule: 12 d^2 + 8 C d + C^2
    forward and about twice that backward, per head.
    """
    width, head_dim = backbone.hidden_size, backbone.hidden_size // backbone.num_attention_heads
    kv_width = (backbone.num_key_value_heads or backbone.num_attention_heads) * head_dim
    matrices = 2.0 * (2 * width * width + 2 * width * kv_width + 3 * width * backbone.intermediate_size)
    attention = 4.0 * width * attention_reach(config, sequence_length)
    head = 2.0 * width * backbone.vocab_size
    memory = config.memory
    inner = memory.heads * memory.head_dim
    branch = 2.0 * (
        4 * width * inner
        + 2 * width * memory.heads
        + memory.gate_rank * (width + inner)
        + 2 * memory.persistent * inner
    )
    scan = memory.heads * (12.0 * memory.head_dim**2 + 8 * memory.chunk * memory.head_dim + memory.chunk**2)
    count = len(memory.layers)
    forward = backbone.num_hidden_layers * (matrices + attention) + head + count * (branch + scan)
    if config.backbone.trainable:
        backward = 2 * forward
    elif count:
        above = backbone.num_hidden_layers - 1 - min(memory.layers)
        backward = above * (matrices + 2 * attention) + head + 2 * count * (branch + scan)
    else:
        backward = 0.0
    return Flops(forward, backward)


def carry_bytes(config: MirasConfig, backbone: Olmo2Config, element: int) -> int:
    """What one stream carries from step to step: keys and values of the window, and float32 states."""
    head_dim = backbone.hidden_size // backbone.num_attention_heads
    kv_width = (backbone.num_key_value_heads or backbone.num_attention_heads) * head_dim
    attention, memory = config.attention, config.memory
    window = 0 if attention.kind == "full" else 2 * element * kv_width * (attention.window + attention.sinks)
    states = 8 * memory.heads * memory.head_dim**2
    return backbone.num_hidden_layers * window + len(memory.layers) * states


def activation_bytes(config: MirasConfig, backbone: Olmo2Config, element: int, *, recompute: bool) -> int:
    """Estimate of what one token leaves for the backward pass.

    A block keeps about 10 widths and 3 feed-forward widths when its weights are trained and 6 and 2 when they are
    frozen; a memory keeps its projections, the chunk-start states (2 d^2 per chunk) and the coefficients (6 C) in
    float32. With recomputation every block keeps its input alone, and one block at a time is whole.
    """
    memory = config.memory
    trainable = config.backbone.trainable
    block = element * (
        (10 if trainable else 6) * backbone.hidden_size + (3 if trainable else 2) * backbone.intermediate_size
    )
    inner = memory.heads * memory.head_dim
    branch = 8 * element * inner + 4 * memory.heads * (2 * memory.head_dim**2 // memory.chunk + 6 * memory.chunk)
    first = 0 if trainable else min(memory.layers, default=backbone.num_hidden_layers)
    learning = backbone.num_hidden_layers - first
    if recompute:
        return learning * element * backbone.hidden_size + block + branch
    return learning * block + len(memory.layers) * branch
