"""The model: an `Olmo2ForCausalLM` whose attention is sequence-parallel, with a memory beside chosen layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, Olmo2Config, Olmo2ForCausalLM
from transformers.models.olmo2.modeling_olmo2 import Olmo2RotaryEmbedding

from pipeline.errors import UserError
from pipeline.ops.attention import (
    AttentionPlan,
    Rope,
    WindowCarry,
    choose_attention,
    full_attention,
    plan_full_attention,
    plan_window_attention,
    window_attention,
)
from pipeline.ops.cross_entropy import linear_argmax, linear_cross_entropy
from pipeline.parallel.exchange import to_heads, to_sequence
from pipeline.parallel.topology import Topology
from pipeline.systems.miras.attachments import (
    ContextBranch,
    ContextMemory,
    ContextTokens,
    check_attachment,
    output_gate,
)
from pipeline.systems.miras.config import AttentionConfig, MirasConfig
from pipeline.systems.miras.memory import MemoryBranch, MemoryCarry, MemoryHealth
from pipeline.systems.miras.segments import SegmentPlan, plan_segments

ATTENTION_NAME = "mnemos"
"""The name under which transformers knows our attention."""


class LayerCarry(NamedTuple):
    """What a stream carries from one step to the next at one layer; None where the layer has no such part."""

    attention: WindowCarry | None
    memory: MemoryCarry | None


class ModelOutput(NamedTuple):
    """losses [batch, sequence / degree]: nats per label, 0 where ignored; predictions alike, int64, when asked for."""

    losses: Tensor
    predictions: Tensor | None
    carry: list[LayerCarry]
    health: list[MemoryHealth]


@dataclass
class _AttentionCall:
    """What one forward pass hands to attention through transformers' layers, and gets back from it."""

    plan: AttentionPlan
    topology: Topology
    segment_ids: Tensor
    before: list[LayerCarry]
    segments: SegmentPlan | None
    """For memories that are context of attention."""
    attention: dict[int, WindowCarry] = field(default_factory=dict)
    memory: dict[int, tuple[MemoryCarry, MemoryHealth]] = field(default_factory=dict)


class _LayerMemory(NamedTuple):
    """What attention of one layer meets of its memory: a gate of its output, or the memory itself with its tokens."""

    gate: Tensor | None = None
    """[batch, sequence / degree, width]."""
    context: tuple[ContextMemory, ContextTokens] | None = None


class LossHead(nn.Linear):
    """The output embedding, which turns hidden states into losses without holding the logits of a sequence."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, labels: Tensor | None = None, predict: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        if labels is None:
            return super().forward(hidden)
        flat = hidden.flatten(0, 1)
        losses = linear_cross_entropy(flat, self.weight, labels.flatten()).view_as(labels)
        predictions = linear_argmax(flat, self.weight).view_as(labels) if predict else None
        return losses, predictions


class MirasModel(nn.Module):
    """Backbone and memories. Parameter names: `backbone.*` as in transformers, `memory.LAYER.*`."""

    def __init__(self, config: MirasConfig, backbone: Olmo2Config, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.backbone = Olmo2ForCausalLM(backbone)
        self.backbone.lm_head = LossHead(backbone.hidden_size, backbone.vocab_size, bias=False)
        check_attachment(config.memory, backbone)
        branches = {str(layer): self._branch(activation_checkpointing) for layer in config.memory.layers}
        self.memory = nn.ModuleDict(branches)
        self.activation_checkpointing = activation_checkpointing
        self._rope: Rope | None = None

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        segment_ids: Tensor,
        positions: Tensor,
        carry: list[LayerCarry] | None,
        topology: Topology,
        *,
        use_memory: bool = True,
        predict: bool = False,
    ) -> ModelOutput:
        """One forward pass over this rank's part of the sequences.

        input_ids and labels [batch, sequence / degree] (this rank's part), segment_ids and positions [batch, sequence]
        (whole), carry one entry per layer or None at the start of the streams.
        """
        layers = self.backbone.model.layers
        hidden = self.backbone.model.embed_tokens(input_ids)
        before = carry or [LayerCarry(None, None)] * len(layers)
        attachment = self.config.memory.attachment
        call = _AttentionCall(
            self._plan(segment_ids, positions, before[0].attention, hidden),
            topology,
            segment_ids,
            before,
            self._segments(segment_ids, positions, before) if use_memory and attachment == "mac" else None,
        )
        # transformers rotates before attention; here rotation comes after the exchange, where positions can be rebased.
        unrotated = (hidden.new_ones(1, 1, 1), hidden.new_zeros(1, 1, 1))

        def block(index: int, hidden: Tensor, gate: Tensor | None) -> Tensor:
            memory = _LayerMemory(gate)
            if call.segments is not None and str(index) in self.memory:
                branch = self.memory[str(index)]
                assert isinstance(branch, ContextBranch)
                memory = _LayerMemory(context=(branch.core, branch.inputs(hidden)))
            return layers[index](hidden, position_embeddings=unrotated, attention_call=call, layer_memory=memory)

        def remember(index: int, hidden: Tensor) -> tuple[Tensor, MemoryCarry, MemoryHealth]:
            return self.memory[str(index)](hidden, segment_ids, before[index].memory, topology)

        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for index in range(len(layers)):
            attached = use_memory and str(index) in self.memory
            added = gate = None
            if attached and attachment != "mac":
                # Apart from the block, so that the two are never whole at the same time.
                if recompute:
                    added, *rest = checkpoint(remember, index, hidden, use_reentrant=False)
                else:
                    added, *rest = remember(index, hidden)
                call.memory[index] = (rest[0], rest[1])
                if attachment == "mal":
                    hidden, added = hidden + added, None
                elif attachment == "mag":
                    gate, added = output_gate(added), None
            # Below the first memory of a frozen backbone nothing is differentiated: recomputing would only cost time.
            learns = hidden.requires_grad or (attached and attachment != "residual")
            if recompute and learns:
                hidden = checkpoint(block, index, hidden, gate, use_reentrant=False)
            else:
                hidden = block(index, hidden, gate)
            if added is not None:
                hidden = hidden + added
        hidden = self.backbone.model.norm(hidden)
        losses, predictions = self.backbone.lm_head(hidden, labels, predict)
        memories = [call.memory.get(index, (None, None)) for index in range(len(layers))]
        after = [LayerCarry(call.attention.get(index), memory) for index, (memory, _) in enumerate(memories)]
        return ModelOutput(losses, predictions, after, [health for _, health in memories if health is not None])

    def _branch(self, recompute: bool) -> nn.Module:
        """A memory as one layer has it."""
        backbone, memory = self.backbone.config, self.config.memory
        width, eps = backbone.hidden_size, backbone.rms_norm_eps
        if memory.attachment == "mac":
            return ContextBranch(width, width // backbone.num_attention_heads, memory, eps, recompute=recompute)
        return MemoryBranch(width, memory, eps)

    def _segments(self, segment_ids: Tensor, positions: Tensor, before: list[LayerCarry]) -> SegmentPlan | None:
        memory = self.config.memory
        if not memory.layers:
            return None
        carry = before[memory.layers[0]].memory
        ids = None if carry is None else carry.tail_segments
        return plan_segments(
            segment_ids, positions, ids, length=memory.context, taps=memory.conv, grain=memory.chunk_start or 1
        )

    def _plan(self, segment_ids: Tensor, positions: Tensor, carry: WindowCarry | None, hidden: Tensor) -> AttentionPlan:
        if self._rope is None:
            rotary = Olmo2RotaryEmbedding(self.backbone.config)
            self._rope = Rope(rotary.inv_freq.double(), float(rotary.attention_scaling))
        attention = self.config.attention
        backend = attention_backend(attention, self.backbone.config, hidden.device.type, hidden.dtype)
        if attention.kind == "full":
            return plan_full_attention(segment_ids, positions, rope=self._rope, backend=backend, dtype=hidden.dtype)
        return plan_window_attention(
            segment_ids, positions, rope=self._rope, window=attention.window, sinks=attention.sinks, carry=carry,
            backend=backend, dtype=hidden.dtype,
        )  # fmt: skip


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attention_call: _AttentionCall,
    layer_memory: _LayerMemory,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: q, k, v [batch, heads, sequence / degree, dim], unrotated.

    What it gives goes to the layer's output projection, [batch, sequence / degree, heads, dim].
    """
    call, topology = attention_call, attention_call.topology
    core, tokens = layer_memory.context or (None, ())
    q, k, v, *rest = to_heads([*(x.transpose(1, 2) for x in (query, key, value)), *tokens], topology)
    index = int(module.layer_idx)  # type: ignore[arg-type]
    if call.plan.kind == "full":
        out = full_attention(q, k, v, call.plan, scale=scaling)
    else:
        out, carry = window_attention(q, k, v, call.plan, call.before[index].attention, scale=scaling)
        call.attention[index] = carry
    if core is not None:
        assert call.segments is not None
        out, memory, health = core(
            ContextTokens(*rest),
            q,
            v,
            out,
            call.segment_ids,
            call.segments,
            call.before[index].memory,
            topology,
            scaling,
        )
        call.memory[index] = (memory, health)
    (out,) = to_sequence([out], topology)
    if layer_memory.gate is not None:
        out = out * layer_memory.gate.view_as(out)
    return out, None


AttentionInterface.register(ATTENTION_NAME, attend)


def attention_backend(config: AttentionConfig, backbone: Olmo2Config, device_type: str, dtype: torch.dtype) -> str:
    """The attention backend's name. Raises UserError when the one that was asked for cannot do it."""
    head_dim = backbone.hidden_size // backbone.num_attention_heads
    try:
        return choose_attention(config.kind, config.sinks, device_type, dtype, head_dim, config.backend)
    except ValueError as error:
        raise UserError(f"--model.attention.backend {config.backend}: {error}") from None
