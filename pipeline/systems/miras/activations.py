"""What a training step of the miras system holds on a GPU, by formula: an estimate, in bytes of one rank.

Derived op by op from what the model's eager ops keep and make; tests hold it against the same step traced with tensors
that have sizes and no storage. The fused kernels (FlexAttention, the native scan) count by what they are handed.
"""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedConfig

from pipeline.config import RunConfig
from pipeline.host.devices import Device
from pipeline.lm.activations import block_bytes, head_bytes, plan_bytes
from pipeline.lm.decoder_config import attention_width, kv_width
from pipeline.ops import chunks, dual_scan, mlp_scan, scan_native, swiglu_scan
from pipeline.ops.chunks import span_tokens
from pipeline.ops.dual_maps import QNormLink, SoftmaxLink
from pipeline.ops.scan_torch import kept_bytes, recomputes
from pipeline.parallel.topology import Topology
from pipeline.systems.miras.activation_step import Step
from pipeline.systems.miras.config import LIKE_ATTENTION, MemoryConfig, MirasConfig
from pipeline.systems.miras.layer_kinds import by_layer, on_backbone
from pipeline.systems.miras.rules import empty_read_bytes

TORCH_BACKWARD = 0.6
"""What the backward pass of a scan in PyTorch makes on top of what it finds, as a share of it; measured 0.3 to 0.6."""
DEEP_BACKWARD = 0.1
"""The same for deep memories, whose passes let go of most as they use it."""


def run_bytes(
    config: RunConfig,
    sizes: MirasConfig,
    backbone: PreTrainedConfig,
    topology: Topology,
    element: int,
    device: Device,
) -> dict[str, int]:
    """What a rank of a run holds on a device, by name, where the model computes in numbers of `element` bytes."""
    rows, float16 = config.batch_size, config.precision == "fp16"
    kept, work = step_bytes(
        Step(
            sizes,
            backbone,
            element,
            rows=rows,
            sequence=config.sequence_length,
            degree=topology.sequence,
            recompute=config.activation_checkpointing,
            device=device,
            float16=float16,
        )
    )
    # What the streams of all micro-batches carry is there as it was until the step is complete, and as it will be.
    streams = 2 * config.grad_accum * rows
    carry = streams * carry_bytes(sizes, backbone, element) // topology.sequence
    return {"carry": carry, "kept activations": kept, "working set": work}


def step_bytes(step: Step) -> tuple[int, int]:
    """(kept, at work): what waits for the backward pass, and the most that a part of the step makes beside it.

    With recomputation a block or a memory is whole one at a time: its saved tensors then count as work.
    """
    trainable = step.sizes.backbone.trainable
    element, width, layers = step.element, step.backbone.hidden_size, step.backbone.num_hidden_layers
    hidden = element * width * step.tokens
    by_number = step.kinds
    first = 0 if trainable else min(by_number, default=layers)
    # Of a frozen backbone, blocks before the first memory are not differentiated, nor is the one beside it.
    beside = bool(by_number) and by_number[min(by_number)].attachment == "residual"
    learning = layers - first - (not trainable and beside)
    block, block_work = block_bytes(step)
    memories = [(kind.attachment, *memory_bytes(step, kind)) for kind in by_number.values()]
    # What is recomputed at a time: a block, or a memory, or a block with a memory inside of its attention.
    whole = [kept + work for attachment, kept, work in memories if attachment not in LIKE_ATTENTION]
    whole += [block + kept + work for attachment, kept, work in memories if attachment in LIKE_ATTENTION]
    head, head_work = head_bytes(step)
    asked, asking = teacher_bytes(step)
    # The gradients of a block's output, and of the memory that was added to it.
    gradients = hidden * (2 if by_number else 1)
    if step.recompute:
        kept = hidden * block_inputs(step, first) + plan_bytes(step) + asked
        work = max([block + block_work, *whole])
        return kept, max(gradients + work, head + head_work, asking)
    added = hidden * sum(attachment not in LIKE_ATTENTION for attachment, *_ in memories)
    kept = learning * block + sum(kept for _, kept, _ in memories) + added + plan_bytes(step)
    branch_work = max((work for *_, work in memories), default=0)
    # The loss has let go of what it kept when the blocks are differentiated.
    return kept + asked, max(gradients + max(block_work, branch_work), head + head_work, asking)


def teacher_bytes(step: Step) -> tuple[int, int]:
    """(kept, made on the way) by a teacher: what it said at the compared tokens, its plan's rotations and mask, and a
    block's forward pass at a time, with nothing kept for a backward pass."""
    sizes = step.sizes
    if sizes.distil != "full":
        return 0, 0
    settings, width = sizes.distillation, step.backbone.hidden_size
    compared = step.rows * min(settings.tokens or step.sequence, step.sequence // step.degree)
    # The last norm's output, the divergence's gradient, and hidden states behind each memory.
    states = 2 * width if settings.kl else 0
    states += 2 * len(sizes.memory.layers) * (width * (settings.hidden > 0))
    states += 2 * len(sizes.memory.layers) * (attention_width(step.backbone) * (settings.attention > 0))
    kept = step.element * compared * states + 4 * step.head_dim * step.rows * step.sequence
    inner = max(3 * step.backbone.intermediate_size, 3 * attention_width(step.backbone) + 2 * step.kv_width)
    return kept, step.tokens * (step.element * (2 * width + inner) + 4 * width)


def block_inputs(step: Step, first: int) -> int:
    """Tensors like the hidden states that recomputation starts from."""
    # A memory reads what its block reads; before a block (mal) or as its gate (mag) it gives a tensor of its own.
    own = sum({"mal": 1, "mag": 2}.get(kind.attachment, 0) for kind in step.kinds.values())
    return step.backbone.num_hidden_layers - first + own


def memory_bytes(step: Step, memory: MemoryConfig) -> tuple[int, int]:
    """(saved, made beside it) of a layer's memory."""
    if memory.attachment == "slots":
        return slot_bytes(step, memory)
    branch = step.tokens * branch_bytes(memory, step.backbone.hidden_size, step.element, step.head_dim)
    scan, scan_work = scan_bytes(step, memory)
    # At the end of its forward pass q, k and v before and after the convolution are there, saved or not; of overflow,
    # which has none, their gradients at the end of its backward pass.
    there = 3 if memory.attachment == "overflow" else 5
    forward = there * step.element * memory.heads * memory.head_dim * step.tokens
    return branch + scan, max(forward, scan_work)


def slot_bytes(step: Step, memory: MemoryConfig) -> tuple[int, int]:
    """(saved, made beside it) of a layer's slots beside its attention to the window.

    The maps keep keys and values of the slots of every chunk, FlexAttention what was read of them and its output for
    every query; beside it are gradients of what was read. How often the slots are there is as measured.
    """
    element, chunk, count = step.element, memory.slots.chunk, memory.slots.count
    rows, kv = step.rows / step.degree, step.kv_width // memory.head_dim
    slots = element * rows * step.sequence / chunk * kv * memory.head_dim * count
    queries = element * step.tokens * memory.heads * memory.head_dim
    # What the rest of the block kept is gone by then; before, it works beside all that is saved.
    freed = 3 * element * step.backbone.intermediate_size * step.tokens
    return int(3 * slots + queries), int(max(4 * slots + queries - freed, block_bytes(step)[1]))


def carry_bytes(config: MirasConfig, backbone: PreTrainedConfig, element: int) -> int:
    """What one stream carries from step to step: keys and values of the window, and float32 states."""
    attention = config.attention
    window = 0 if attention.kind == "full" else 2 * element * kv_width(backbone) * (attention.window + attention.sinks)
    memories = 0
    for kind in by_layer(on_backbone(config, backbone).memory, backbone).values():
        if kind.attachment == "slots":
            # Keys, values, counts, ages and weights.
            memories += 4 * kind.slots.count * kv_width(backbone) // kind.head_dim * (2 * kind.head_dim + 3)
            continue
        memories += 8 * kind.heads * kind.state_rows * kind.head_dim
        if kind.attachment == "mac":
            # The segment that a step ends in is done again by the next one.
            memories += (kind.context + kind.conv - 2) * (4 * kind.heads * (4 * kind.head_dim + 2) + 8)
        elif kind.attachment == "overflow":
            # Step sizes of the tokens that leave next.
            memories += attention.window * (4 * kind.heads + 8)
    return backbone.num_hidden_layers * window + memories


def branch_bytes(memory: MemoryConfig, width: int, element: int, attention_dim: int) -> int:
    """What one token leaves in a memory branch, its scan left out; attention_dim is the size of an attention head.

    Per head and element of it: q, k, v behind the convolution's tail, and convolved (6), q as it is read (1), the head
    norm (2), the gate, what it multiplies and the product (3); in float32, normalisation keeps q and k (a wider type
    than the model's) or the SiLU's whole output (the model's own). `mac`: as measured at one shape.
    """
    if memory.attachment == "overflow":
        # Queries and keys before their maps, and mapped in float32; what is mixed in; the normed input in float32.
        head = (3 * element + 8) * memory.head_dim if element < 4 else 5 * element * memory.head_dim
        # What SiLU gives, in float32.
        head += 8 * memory.head_dim if memory.key_activation == "silu" else 0
        return memory.heads * (head + 40) + (8 if element < 4 else 4) * width
    # The normed input, and its float32 copy for the gates.
    shared = (element + (4 if element < 4 else 0)) * width
    if memory.attachment == "mac":
        dim = memory.head_dim
        head = element * (18 * dim + 14 * attention_dim) + (20 * dim if element < 4 else 0)
        return memory.heads * (head + 16 * memory.state_rows * dim // memory.context) + shared
    normalised = 8 if element < 4 else 3 * element
    head = (12 * element + normalised) * memory.head_dim + element * memory.persistent + 40
    return memory.heads * head + element * memory.gate_rank + shared


def scan_bytes(step: Step, memory: MemoryConfig) -> tuple[int, int]:
    """(kept, made beside it) of the scan of one layer.

    The native kernels keep q, k, v, gates, residuals and states at intervals, and make scratch memory and gradients. In
    PyTorch a call whose spans are recomputed keeps k, the SiLU's output that v is a part of, three gates, and the
    states at every span's start; one span at a time is whole. q is the branch's own.
    """
    element, sequence = step.element, step.sequence
    rows = max(1, step.rows * memory.heads // step.degree)
    dim, states = memory.head_dim, 2 if memory.has_momentum else 1
    if step.runs_natively(memory):
        dtype = torch.float32 if element == 4 or step.float16 else torch.bfloat16
        own = 0 if step.float16 else rows * sequence * element * dim
        kept = scan_native.kept_bytes(rows, sequence, dim, dim, dtype) - own
        return kept, scan_native.workspace_bytes(rows, sequence, dim, dim, dtype)
    if memory.chunk_start is not None:
        kept, span = _chunk_start_bytes(memory, element, rows=rows, sequence=sequence)
    else:
        sizes = {"key_dim": dim, "value_dim": dim, "states": states, "chunk": min(memory.chunk, sequence)}
        tokens = span_tokens(rows, **sizes, device_type="cuda")
        kept, span = kept_bytes(rows, sequence, **sizes), 0
        if recomputes(rows, sequence, **sizes, span=tokens):
            span = kept_bytes(rows, tokens, **sizes)
            kept = rows * (sequence * _span_inputs(element, dim) + -(-sequence // tokens) * 4 * states * dim**2)
    backward = DEEP_BACKWARD if memory.hidden else TORCH_BACKWARD
    return kept, int(span * (1 + backward) if span else kept * backward)


def _span_inputs(element: int, dim: int) -> int:
    """What one token of a head hands to a span that is recomputed."""
    return (element + (3 * element if element < 4 else 0)) * dim + 12


def _chunk_start_bytes(memory: MemoryConfig, element: int, *, rows: int, sequence: int) -> tuple[int, int]:
    """What a chunk-start rule keeps, and a span of it that is recomputed; rows is batch x this rank's heads."""
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
    return rows * sequence * _span_inputs(element, dim) + math.ceil(sequence / span) * state + empty, working
