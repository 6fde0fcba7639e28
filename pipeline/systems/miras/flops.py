"""Model FLOPs per token: causal attention at its mean reach, recomputation not counted."""

from __future__ import annotations

import math

import torch
from transformers import Olmo2Config

from pipeline.ops import chunks, dual_scan, mlp_scan, native, scan_native, swiglu_scan
from pipeline.ops.chunks import span_tokens
from pipeline.ops.dual_maps import QNormLink, SoftmaxLink
from pipeline.ops.scan_torch import kept_bytes, recomputes
from pipeline.system import Flops
from pipeline.systems.miras.config import MemoryConfig, MirasConfig
from pipeline.systems.miras.rules import empty_read_bytes


def attention_reach(config: MirasConfig, sequence_length: int) -> float:
    """Mean number of keys that a query meets when documents are as long as they can be."""
    attention = config.attention
    if attention.kind == "full":
        return (sequence_length + 1) / 2
    return float(attention.window + attention.sinks)


def count_flops(config: MirasConfig, backbone: Olmo2Config, sequence_length: int) -> Flops:
    """Forward and backward model FLOPs per token.

    A multiply-add is two FLOPs. A frozen matrix has an input gradient and no weight gradient, and what comes before
    the first memory has no backward pass at all. A scan costs about twice its forward pass backward.
    """
    width, head_dim = backbone.hidden_size, backbone.hidden_size // backbone.num_attention_heads
    kv_width = (backbone.num_key_value_heads or backbone.num_attention_heads) * head_dim
    matrices = 2.0 * (2 * width * width + 2 * width * kv_width + 3 * width * backbone.intermediate_size)
    attention = 4.0 * width * attention_reach(config, sequence_length)
    head = 2.0 * width * backbone.vocab_size
    memory = config.memory
    branch = branch_flops(memory, width, head_dim)
    scan = memory.heads * scan_flops(memory)
    count = len(memory.layers)
    forward = backbone.num_hidden_layers * (matrices + attention) + head + count * (branch + scan)
    if config.backbone.trainable:
        backward = 2 * forward
    elif count:
        above = backbone.num_hidden_layers - 1 - min(memory.layers)
        backward = above * (matrices + 2 * attention) + head + 2 * count * (branch + scan)
        # Of the first memory's own block: nothing beside it, all of it behind it, and what comes after attention.
        if memory.attachment == "mal":
            backward += matrices + 2 * attention
        elif memory.attachment in ("mag", "mac"):
            backward += 2.0 * (width * width + 3 * width * backbone.intermediate_size)
    else:
        backward = 0.0
    return Flops(forward, backward)


def branch_flops(memory: MemoryConfig, width: int, attention_dim: int) -> float:
    """Of a memory branch per token, forward, its scan left out; attention_dim is the size of an attention head.

    `mac` (docs/attachments.md) reads before its segment, attends to the reads of half a segment and the persistent
    pairs, writes from two vectors of attention, and gates attention's output.
    """
    heads, dim = memory.heads, memory.head_dim
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


def carry_bytes(config: MirasConfig, backbone: Olmo2Config, element: int) -> int:
    """What one stream carries from step to step: keys and values of the window, and float32 states."""
    head_dim = backbone.hidden_size // backbone.num_attention_heads
    kv_width = (backbone.num_key_value_heads or backbone.num_attention_heads) * head_dim
    attention, memory = config.attention, config.memory
    window = 0 if attention.kind == "full" else 2 * element * kv_width * (attention.window + attention.sinks)
    states = 8 * memory.heads * memory.state_rows * memory.head_dim
    if memory.attachment == "mac":
        # The segment that a step ends in is done again by the next one.
        states += (memory.context + memory.conv - 2) * (4 * memory.heads * (4 * memory.head_dim + 2) + 8)
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
    memory = branch_bytes(config, width, element, width // backbone.num_attention_heads) + scan
    first = 0 if trainable else min(config.memory.layers, default=backbone.num_hidden_layers)
    learning = backbone.num_hidden_layers - first
    if not config.memory.layers:
        memory = span = 0
    if recompute:
        inputs = (learning + len(config.memory.layers)) * element * width
        return inputs + max(block, memory + span)
    return learning * block + len(config.memory.layers) * memory + span


def branch_bytes(config: MirasConfig, width: int, element: int, attention_dim: int) -> int:
    """What one token leaves in a memory branch, its scan left out; attention_dim is the size of an attention head.

    Per head and element of it: q, k, v behind the convolution's tail, and convolved (6), q as it is read (1), the head
    norm (2), the gate, what it multiplies and the product (3); in float32, normalisation keeps q and k (a wider type
    than the model's) or the SiLU's whole output (the model's own). `mac`: as measured at one shape.
    """
    memory = config.memory
    # The normed input, and its float32 copy for the gates.
    shared = (element + (4 if element < 4 else 0)) * width
    if memory.attachment == "mac":
        dim = memory.head_dim
        head = element * (18 * dim + 14 * attention_dim) + (20 * dim if element < 4 else 0)
        return memory.heads * (head + 16 * memory.state_rows * dim // memory.context) + shared
    normalised = 8 if element < 4 else 3 * element
    head = (12 * element + normalised) * memory.head_dim + element * memory.persistent + 40
    return memory.heads * head + element * memory.gate_rank + shared


def runs_natively(memory: MemoryConfig, element: int) -> bool:
    """Whether the scan of a run on a GPU would be the native one, as far as can be said without a GPU."""
    built = memory.backend != "torch" and native.library("cuda") is not None
    return built and memory.chunk_start is None and memory.head_dim in scan_native.KEY_DIMS and element in (2, 4)


def scan_bytes(
    config: MirasConfig, element: int, *, rows: int, sequence: int, degree: int, natively: bool | None = None
) -> tuple[int, int]:
    """What the scan of one layer keeps on one rank of a GPU, and the working set of the span that is recomputed.

    A call whose spans are recomputed keeps k, the SiLU's output that v is a part of, three gates, and the states at
    every span's start; q is the branch's own. `natively` None: as `runs_natively` says.
    """
    memory = config.memory
    if memory.chunk_start is not None:
        return _chunk_start_bytes(memory, element, rows=max(1, rows * memory.heads // degree), sequence=sequence)
    dim, states = memory.head_dim, 2 if memory.has_momentum else 1
    if runs_natively(memory, element) if natively is None else natively:
        dtype = torch.float32 if element == 4 else torch.bfloat16
        heads = max(1, rows * memory.heads // degree)
        return scan_native.kept_bytes(heads, sequence, dim, dim, dtype) - heads * sequence * element * dim, 0
    sizes = {"key_dim": dim, "value_dim": dim, "states": states, "chunk": min(memory.chunk, sequence)}
    heads = max(1, rows * memory.heads // degree)
    span = span_tokens(heads, **sizes, device_type="cuda")
    if not recomputes(heads, sequence, **sizes, span=span):
        return kept_bytes(heads, sequence, **sizes), 0
    inputs = (element + (3 * element if element < 4 else 0)) * dim + 12
    starts = -(-sequence // span) * 4 * states * dim**2
    return heads * (sequence * inputs + starts), kept_bytes(heads, span, **sizes)


def _chunk_start_bytes(memory: MemoryConfig, element: int, *, rows: int, sequence: int) -> tuple[int, int]:
    """`scan_bytes` of a chunk-start rule; rows is batch x this rank's heads."""
    dim, hidden, states = memory.head_dim, memory.hidden, 2 if memory.has_momentum else 1
    chunk = memory.chunk_start
    assert chunk is not None

    def kept(length: int) -> int:
        if memory.rule == "mlp":
            return mlp_scan.kept_bytes(rows, length, dim, hidden, states=states, chunk=chunk)
        if memory.rule == "swiglu":
            return swiglu_scan.kept_bytes(rows, length, dim, hidden, chunk=chunk, muon=memory.swiglu.muon)
        copies = {"moneta": QNormLink.copies, "memora": SoftmaxLink.copies}.get(memory.rule, 0)
        return dual_scan.kept_bytes(rows, length, dim, dim, states=states, chunk=chunk, copies=copies)

    # The read of the empty memory keeps its hidden units, or is recomputed by itself.
    empty = empty_read_bytes(rows * sequence, hidden)
    if empty > chunks.KEEP:
        empty = 0
    whole = kept(sequence)
    if whole <= chunks.KEEP or sequence <= chunk:
        return whole + empty, 0
    state = 4 * rows * states * memory.state_rows * dim
    if memory.rule == "swiglu":
        span, working = chunk, kept(chunk)
    elif memory.rule in ("moneta", "memora"):
        block = dual_scan.block_tokens(rows, dim, dim, chunk=chunk, device_type="cuda")
        span = dual_scan.linked_span(sequence, chunk, block)
        working = span // block * state + kept(block)
    else:
        width = 2 * hidden if memory.rule == "mlp" else dim
        span = span_tokens(rows, dim, width, states=states, chunk=chunk, device_type="cuda")
        if sequence <= span:
            return whole + empty, 0
        working = kept(span)
    inputs = (element + (3 * element if element < 4 else 0)) * dim + 12
    return rows * sequence * inputs + -(-sequence // span) * state + empty, working
