"""The model: a transformers decoder whose attention is sequence-parallel, with a memory beside chosen layers."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from pipeline.lm.attention import AttentionCall, Beside, plan_attention
from pipeline.lm.backbone import UNROTATED, build_backbone, rope_of
from pipeline.lm.config import AttentionConfig
from pipeline.lm.decoder_config import head_dim, kv_heads, norm_eps
from pipeline.lm.distillation import places
from pipeline.ops.attention import AttentionPlan, Rope, WindowCarry
from pipeline.ops.attention_slots import SlotPlan, plan_slots
from pipeline.parallel.topology import Topology
from pipeline.systems.miras.attachments import check_attachment, output_gate
from pipeline.systems.miras.config import MemoryConfig, MirasConfig
from pipeline.systems.miras.context_memory import ContextBranch
from pipeline.systems.miras.emptied import split_at_windows
from pipeline.systems.miras.inside import INSIDE, LayerCarry, Step, beside_attention, own_carry
from pipeline.systems.miras.layer_kinds import by_layer, kinds_of_memory, on_backbone
from pipeline.systems.miras.memory import MemoryBranch, MemoryCarry, MemoryHealth
from pipeline.systems.miras.overflow import OverflowBranch, OverflowPlan, plan_overflow
from pipeline.systems.miras.segments import SegmentPlan, plan_segments
from pipeline.systems.miras.slots import SlotBranch, SlotHealth, slots_backend
from pipeline.systems.miras.teacher import Teacher


class ModelOutput(NamedTuple):
    """losses [batch, sequence / degree]: nats per label, 0 where ignored; predictions alike, int64, when asked for."""

    losses: Tensor | None
    """None where they were not asked for."""
    predictions: Tensor | None
    carry: list[LayerCarry]
    health: list[MemoryHealth | SlotHealth]
    distilled: dict[str, Tensor] | None = None
    """Sums over this rank's compared tokens by loss term, where there is a teacher."""
    hidden: Tensor | None = None
    """What the output embedding takes, [batch, sequence / degree, width], where there are no labels."""


class MirasModel(nn.Module):
    """Backbone and memories. Parameter names: `backbone.*` as in transformers, `memory.LAYER.*`."""

    def __init__(
        self, config: MirasConfig, backbone: PreTrainedConfig, *, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config = config = on_backbone(config, backbone)
        self.backbone = build_backbone(backbone)
        for kind in kinds_of_memory(config.memory, backbone):
            check_attachment(kind, backbone, config.attention)
        self.kinds = by_layer(config.memory, backbone)
        branches = {str(layer): self._branch(kind, activation_checkpointing) for layer, kind in self.kinds.items()}
        self.memory = nn.ModuleDict(branches)
        self.activation_checkpointing = activation_checkpointing
        self._rope: Rope | None = None

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        segment_ids: Tensor,
        positions: Tensor,
        carry: list[LayerCarry] | None,
        topology: Topology,
        *,
        use_memory: bool = True,
        emptied: bool = False,
        attention: AttentionConfig | None = None,
        predict: bool = False,
        compared: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> ModelOutput:
        """One forward pass over this rank's part of the sequences.

        input_ids and labels [batch, sequence / degree] (this rank's part), segment_ids and positions [batch, sequence]
        (whole), carry one entry per layer or None at the start of the streams. `emptied`: memories hold nothing from
        beyond what attention sees (`emptied.py`). `attention`: in place of the model's own. The carry of one choice of
        these is not that of another. compared [batch, sequence] bool (whole): the tokens at which the teacher is asked
        too, in training: an evaluation measures the student alone. Without labels no losses are computed, and the
        hidden states are given instead. `states` gets those of the embedding and behind every layer, like them.
        """
        attention = attention or self.config.attention
        layers = self.backbone.model.layers
        hidden = self.backbone.model.embed_tokens(input_ids)
        before = carry or [LayerCarry(None, None)] * len(layers)
        kinds = self.kinds if use_memory else {}
        memory_ids, memory_positions = segment_ids, positions
        if emptied and attention.kind == "window":
            memory_ids, memory_positions = split_at_windows(segment_ids, positions, attention.window)
        elif emptied:
            before = [carry._replace(memory=None) for carry in before]
        plan = self._plan(attention, segment_ids, positions, before[0].attention, hidden)
        step = Step(
            AttentionCall(plan, topology, [carry.attention for carry in before]),
            memory_ids,
            before,
            self._segments(memory_ids, memory_positions, before) if use_memory else None,
            self._overflow(segment_ids, positions, before, written=not emptied) if use_memory else None,
            self._slots(segment_ids, positions, before, plan, hidden.dtype) if use_memory and not emptied else None,
            kinds,
            {},
        )
        teacher = None
        first = 0
        if compared is not None and self.training:
            distillation = self.config.distillation
            teacher = Teacher(
                distillation,
                tuple(self.kinds),
                places(compared[:, topology.shard(compared.shape[1])], distillation.tokens),
            )
            # Frozen and without a memory: with the same attention too, one pass is that of both, to the bit.
            first = teacher.first if distillation.lower_layers == "window" else 0
        if states is not None:
            states.append(hidden)
        for index in range(first):
            hidden = self._layer(index, hidden, step)
        if teacher is not None:
            full = AttentionConfig("full", backend=self.config.attention.backend)
            asked = self._plan(full, segment_ids, positions, None, hidden)
            teacher.run(self.backbone, hidden, AttentionCall(asked, topology, [], keep=teacher.kept), first)
            step.attention.keep = teacher.kept
        for index in range(first, len(layers)):
            hidden = self._layer(index, hidden, step)
            if states is not None:
                states.append(hidden)
            if teacher is not None:
                teacher.compare(index, hidden, step.attention)
        # A block that is recomputed in the backward pass keeps nothing more.
        step.attention.keep = ()
        hidden = self.backbone.model.norm(hidden)
        losses = predictions = None
        if labels is not None and (teacher is None or self.config.distillation.cross_entropy):
            losses, predictions = self.backbone.lm_head(hidden, labels, predict)
        distilled = None if teacher is None else teacher.distilled(self.backbone.lm_head, hidden)
        memories = [step.memory.get(index, (None, None)) for index in range(len(layers))]
        after = [LayerCarry(step.attention.after.get(index), memory) for index, (memory, _) in enumerate(memories)]
        health = [health for _, health in memories if health is not None]
        return ModelOutput(losses, predictions, after, health, distilled, hidden if labels is None else None)

    def _layer(self, index: int, hidden: Tensor, step: Step) -> Tensor:
        """One layer with its memory, of hidden [batch, sequence / degree, width]."""
        layers = self.backbone.model.layers
        attachment = step.kinds[index].attachment if index in step.kinds else None

        def block(hidden: Tensor, gate: Tensor | None) -> Tensor:
            beside = Beside(gate)
            if attachment in INSIDE:
                beside = beside_attention(self.memory[str(index)], index, hidden, step)
            return layers[index](hidden, position_embeddings=UNROTATED, attention_call=step.attention, beside=beside)

        def remember(hidden: Tensor) -> tuple[Tensor, MemoryCarry, MemoryHealth]:
            carry, topology = own_carry(step.before[index].memory), step.attention.topology
            return self.memory[str(index)](hidden, step.segment_ids, carry, topology)

        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        added = gate = None
        if attachment is not None and attachment not in INSIDE:
            # Apart from the block, so that the two are never whole at the same time.
            if recompute:
                added, *rest = checkpoint(remember, hidden, use_reentrant=False)
            else:
                added, *rest = remember(hidden)
            step.memory[index] = (rest[0], rest[1])
            if attachment == "mal":
                hidden, added = hidden + added, None
            elif attachment == "mag":
                gate, added = output_gate(added), None
        # Below the first memory of a frozen backbone nothing is differentiated: recomputing would only cost time.
        learns = hidden.requires_grad or attachment not in (None, "residual")
        if recompute and learns:
            hidden = checkpoint(block, hidden, gate, use_reentrant=False)
        else:
            hidden = block(hidden, gate)
        return hidden if added is None else hidden + added

    def _branch(self, memory: MemoryConfig, recompute: bool) -> nn.Module:
        """A memory as one layer has it."""
        backbone = self.backbone.config
        width, eps = backbone.hidden_size, norm_eps(backbone)
        if memory.attachment == "mac":
            return ContextBranch(width, head_dim(backbone), memory, eps, recompute=recompute)
        if memory.attachment == "overflow":
            return OverflowBranch(width, memory, eps)
        if memory.attachment == "slots":
            return SlotBranch(width, kv_heads(backbone), memory, eps)
        return MemoryBranch(width, memory, eps)

    def _first(self, attachment: str) -> int | None:
        """The first layer with a memory of this kind."""
        return next((layer for layer, kind in self.kinds.items() if kind.attachment == attachment), None)

    def _overflow(
        self, segment_ids: Tensor, positions: Tensor, before: list[LayerCarry], *, written: bool
    ) -> OverflowPlan | None:
        first, attention = self._first("overflow"), self.config.attention
        if first is None:
            return None
        window, memory = before[first].attention, own_carry(before[first].memory)
        # A memory that starts now, behind a window that does not, has taken in nothing of it.
        known = None if window is None or memory is None else (memory.tail_segments, window.positions)
        plan = plan_overflow(segment_ids, positions, known, window=attention.window, sinks=attention.sinks)
        return dataclasses.replace(plan, written=written)

    def _slots(
        self,
        segment_ids: Tensor,
        positions: Tensor,
        before: list[LayerCarry],
        plan: AttentionPlan,
        dtype: torch.dtype,
    ) -> SlotPlan | None:
        first, attention = self._first("slots"), self.config.attention
        if first is None:
            return None
        window, kind = before[first].attention, self.kinds[first]
        settings = kind.slots
        return plan_slots(
            segment_ids,
            positions,
            None if window is None else (window.segment_ids, window.positions),
            rope=self._rope_of_backbone(),
            window=attention.window,
            sinks=attention.sinks,
            slots=settings.count,
            reach=settings.reach,
            chunk=settings.chunk,
            dtype=dtype,
            backend=slots_backend(kind, plan.backend, segment_ids.device, dtype),
        )

    def _segments(self, segment_ids: Tensor, positions: Tensor, before: list[LayerCarry]) -> SegmentPlan | None:
        first, memory = self._first("mac"), self.config.memory
        if first is None:
            return None
        carry = own_carry(before[first].memory)
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
        rope = self._rope_of_backbone()
        return plan_attention(attention, self.backbone.config, rope, segment_ids, positions, carry, hidden)

    def _rope_of_backbone(self) -> Rope:
        if self._rope is None:
            self._rope = rope_of(self.backbone)
        return self._rope
