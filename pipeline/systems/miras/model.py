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
from pipeline.systems.miras.config import AttentionConfig, MirasConfig
from pipeline.systems.miras.memory import MemoryBranch, MemoryCarry, MemoryHealth

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
    carry: list[WindowCarry | None]
    new: dict[int, WindowCarry] = field(default_factory=dict)


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
        self.memory = nn.ModuleDict(
            {
                str(layer): MemoryBranch(backbone.hidden_size, config.memory, backbone.rms_norm_eps)
                for layer in config.memory.layers
            }
        )
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
        call = _AttentionCall(
            self._plan(segment_ids, positions, before[0].attention, hidden),
            topology,
            [entry.attention for entry in before],
        )
        # transformers rotates before attention; here rotation comes after the exchange, where positions can be rebased.
        unrotated = (hidden.new_ones(1, 1, 1), hidden.new_zeros(1, 1, 1))
        memories: list[MemoryCarry | None] = []
        health: list[MemoryHealth] = []

        def block(index: int, hidden: Tensor) -> Tensor:
            return layers[index](hidden, position_embeddings=unrotated, attention_call=call)

        def remember(index: int, hidden: Tensor) -> tuple[Tensor, MemoryCarry, MemoryHealth]:
            return self.memory[str(index)](hidden, segment_ids, before[index].memory, topology)

        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for index in range(len(layers)):
            # Below the first memory of a frozen backbone nothing is differentiated: recomputing would only cost time.
            if recompute and hidden.requires_grad:
                out = checkpoint(block, index, hidden, use_reentrant=False)
            else:
                out = block(index, hidden)
            memory: MemoryCarry | None = None
            if use_memory and str(index) in self.memory:
                # Apart from the block, so that the two are never whole at the same time.
                if recompute:
                    added, memory, state = checkpoint(remember, index, hidden, use_reentrant=False)
                else:
                    added, memory, state = remember(index, hidden)
                out = out + added
                health.append(state)
            memories.append(memory)
            hidden = out
        hidden = self.backbone.model.norm(hidden)
        losses, predictions = self.backbone.lm_head(hidden, labels, predict)
        after = [LayerCarry(call.new.get(index), memory) for index, memory in enumerate(memories)]
        return ModelOutput(losses, predictions, after, health)

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
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: q, k, v [batch, heads, sequence / degree, dim], unrotated."""
    q, k, v = to_heads([x.transpose(1, 2) for x in (query, key, value)], attention_call.topology)
    index = int(module.layer_idx)  # type: ignore[arg-type]
    if attention_call.plan.kind == "full":
        out = full_attention(q, k, v, attention_call.plan, scale=scaling)
    else:
        out, carry = window_attention(q, k, v, attention_call.plan, attention_call.carry[index], scale=scaling)
        attention_call.new[index] = carry
    (out,) = to_sequence([out], attention_call.topology)
    return out, None


AttentionInterface.register(ATTENTION_NAME, attend)


def attention_backend(config: AttentionConfig, backbone: Olmo2Config, device_type: str, dtype: torch.dtype) -> str:
    """The attention backend's name. Raises UserError when the one that was asked for cannot do it."""
    head_dim = backbone.hidden_size // backbone.num_attention_heads
    try:
        return choose_attention(config.kind, config.sinks, device_type, dtype, head_dim, config.backend)
    except ValueError as error:
        raise UserError(f"--model.attention.backend {config.backend}: {error}") from None
