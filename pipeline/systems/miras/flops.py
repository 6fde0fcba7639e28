"""Model FLOPs per token: causal attention at its mean reach, recomputation not counted."""

from __future__ import annotations

from transformers import Olmo2Config

from pipeline.ops.scan_torch import kept_bytes, recomputes, span_tokens
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


def activation_bytes(
    config: MirasConfig,
    backbone: Olmo2Config,
    element: int,
    *,
    recompute: bool,
    rows: int = 1,
    sequence: int = 4096,
    degree: int = 1,
) -> int:
    """Estimate of what one token leaves for the backward pass, on all `degree` sequence ranks together.

    The scan keeps less per token once a call of `rows` x `sequence` tokens is large; see `scan_bytes`. Norms keep their
    float32 inputs, and their outputs too when the backbone is trained. With recomputation every block keeps its input
    alone, a memory its own input too, and one block or memory at a time is whole.
    """
    width, ffn = backbone.hidden_size, backbone.intermediate_size
    trainable = config.backbone.trainable
    block = (
        (6 * element + 32) * width + 4 * element * ffn if trainable else (4 * element + 16) * width + 3 * element * ffn
    )
    kept, working = scan_bytes(config, element, rows=rows, sequence=sequence, degree=degree)
    scan, span = (-(-size * degree // (rows * sequence)) for size in (kept, working))
    memory = branch_bytes(config, width, element) + scan
    first = 0 if trainable else min(config.memory.layers, default=backbone.num_hidden_layers)
    learning = backbone.num_hidden_layers - first
    if not config.memory.layers:
        memory = span = 0
    if recompute:
        inputs = (learning + len(config.memory.layers)) * element * width
        return inputs + max(block, memory + span)
    return learning * block + len(config.memory.layers) * memory + span


def branch_bytes(config: MirasConfig, width: int, element: int) -> int:
    """What one token leaves in a memory branch, its scan left out.

    Per head and element of it: q, k, v behind the convolution's tail, and convolved (6), q as it is read (1), the head
    norm (2), the gate, what it multiplies and the product (3); in float32, normalisation keeps q and k (a wider type
    than the model's) or the SiLU's whole output (the model's own).
    """
    memory = config.memory
    normalised = 8 if element < 4 else 3 * element
    head = (12 * element + normalised) * memory.head_dim + element * memory.persistent + 40
    # The normed input, and its float32 copy for the gates.
    shared = (element + (4 if element < 4 else 0)) * width
    return memory.heads * head + element * memory.gate_rank + shared


def scan_bytes(config: MirasConfig, element: int, *, rows: int, sequence: int, degree: int) -> tuple[int, int]:
    """What the scan of one layer keeps on one rank of a GPU, and the working set of the span that is recomputed.

    A call whose spans are recomputed keeps k, the SiLU's output that v is a part of, three gates, and the states at
    every span's start; q is the branch's own.
    """
    memory = config.memory
    dim, states = memory.head_dim, 1 if memory.rule == "delta" else 2
    sizes = {"key_dim": dim, "value_dim": dim, "states": states, "chunk": min(memory.chunk, sequence)}
    heads = max(1, rows * memory.heads // degree)
    span = span_tokens(heads, **sizes, device_type="cuda")
    if not recomputes(heads, sequence, **sizes, span=span):
        return kept_bytes(heads, sequence, **sizes), 0
    inputs = (element + (3 * element if element < 4 else 0)) * dim + 12
    starts = -(-sequence // span) * 4 * states * dim**2
    return heads * (sequence * inputs + starts), kept_bytes(heads, span, **sizes)
