"""The model: a transformers decoder whose attention is sequence-parallel, with a memory beside chosen layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from pipeline.lm.attention import AttentionCall, Beside, plan_attention
from pipeline.lm.backbone import build_backbone, rope_of, unrotated
from pipeline.lm.config import AttentionConfig
from pipeline.lm.decoder_config import head_dim, norm_eps
from pipeline.ops.attention import AttentionPlan, Rope, WindowCarry
from pipeline.parallel.topology import Topology
from pipeline.systems.miras.attachments import (
    ContextBranch,
    ContextTokens,
    check_attachment,
    output_gate,
)
from pipeline.systems.miras.config import MirasConfig
from pipeline.systems.miras.emptied import split_at_windows
from pipeline.systems.miras.memory import MemoryBranch, MemoryCarry, MemoryHealth
from pipeline.systems.miras.segments import SegmentPlan, plan_segments


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


class _Step(NamedTuple):
    """What the layers of one forward pass share, and what their memories leave."""

    attention: AttentionCall
    segment_ids: Tensor
    """Documents as the memories know them."""
    before: list[LayerCarry]
    segments: SegmentPlan | None
    """For memories that are context of attention."""
    memory: dict[int, tuple[MemoryCarry, MemoryHealth]]


class MirasModel(nn.Module):
    """Backbone and memories. Parameter names: `backbone.*` as in transformers, `memory.LAYER.*`."""

    def __init__(
        self, config: MirasConfig, backbone: PreTrainedConfig, *, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(backbone)
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
        emptied: bool = False,
        attention: AttentionConfig | None = None,
        predict: bool = False,
    ) -> ModelOutput:
        """One forward pass over this rank's part of the sequences.

        input_ids and labels [batch, sequence / degree] (this rank's part), segment_ids and positions [batch, sequence]
        (whole), carry one entry per layer or None at the start of the streams. `emptied`: memories hold nothing from
        beyond what attention sees (`emptied.py`). `attention`: in place of the model's own. The carry of one choice of
        these is not that of another.
        """
        attention = attention or self.config.attention
        layers = self.backbone.model.layers
        hidden = self.backbone.model.embed_tokens(input_ids)
        before = carry or [LayerCarry(None, None)] * len(layers)
        attachment = self.config.memory.attachment
        ids, places = segment_ids, positions
        if emptied and attention.kind == "window":
            ids, places = split_at_windows(segment_ids, positions, attention.window)
        elif emptied:
            before = [carry._replace(memory=None) for carry in before]
        call = AttentionCall(
            self._plan(attention, segment_ids, positions, before[0].attention, hidden),
            topology,
            [carry.attention for carry in before],
        )
        step = _Step(
            call,
            ids,
            before,
            self._segments(ids, places, before) if use_memory and attachment == "mac" else None,
            {},
        )
        no_rotation = unrotated(hidden)

        def block(index: int, hidden: Tensor, gate: Tensor | None) -> Tensor:
            beside = Beside(gate)
            if step.segments is not None and str(index) in self.memory:
                beside = self._context(index, hidden, step)
            return layers[index](hidden, position_embeddings=no_rotation, attention_call=call, beside=beside)

        def remember(index: int, hidden: Tensor) -> tuple[Tensor, MemoryCarry, MemoryHealth]:
            return self.memory[str(index)](hidden, ids, before[index].memory, topology)

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
                step.memory[index] = (rest[0], rest[1])
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
        memories = [step.memory.get(index, (None, None)) for index in range(len(layers))]
        after = [LayerCarry(call.after.get(index), memory) for index, (memory, _) in enumerate(memories)]
        return ModelOutput(losses, predictions, after, [health for _, health in memories if health is not None])

    def _branch(self, recompute: bool) -> nn.Module:
        """A memory as one layer has it."""
        backbone, memory = self.backbone.config, self.config.memory
        width, eps = backbone.hidden_size, norm_eps(backbone)
        if memory.attachment == "mac":
            return ContextBranch(width, head_dim(backbone), memory, eps, recompute=recompute)
        return MemoryBranch(width, memory, eps)

    def _context(self, index: int, hidden: Tensor, step: _Step) -> Beside:
        """The memory of a layer as context of its attention, of hidden [batch, sequence / degree, width]."""
        branch, segments = self.memory[str(index)], step.segments
        assert isinstance(branch, ContextBranch) and segments is not None

        def refine(q: Tensor, v: Tensor, out: Tensor, scale: float, *tokens: Tensor) -> Tensor:
            carry, topology = step.before[index].memory, step.attention.topology
            arguments = (ContextTokens(*tokens), q, v, out, step.segment_ids, segments, carry, topology, scale)
            refined, memory, health = branch.core(*arguments)
            step.memory[index] = (memory, health)
            return refined

        return Beside(tokens=branch.inputs(hidden), refine=refine)

    def _segments(self, segment_ids: Tensor, positions: Tensor, before: list[LayerCarry]) -> SegmentPlan | None:
        memory = self.config.memory
        if not memory.layers:
            return None
        carry = before[memory.layers[0]].memory
        ids = None if carry is None else carry.tail_segments
        return plan_segments(
            segment_ids, positions, ids, length=memory.context, taps=memory.conv, grain=memory.chunk_start or 1
        )

    def _plan(
        self,
        attention: AttentionConfig,
        segment_ids: Tensor,
        positions: Tensor,
        carry: WindowCarry | None,
        hidden: Tensor,
    ) -> AttentionPlan:
        if self._rope is None:
            self._rope = rope_of(self.backbone)
        return plan_attention(attention, self.backbone.config, self._rope, segment_ids, positions, carry, hidden)
