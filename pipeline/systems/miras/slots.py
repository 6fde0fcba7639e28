"""A bounded store of keys and values behind attention's window (the attachment `slots`).

Where `overflow` writes what leaves the window into a memory of fixed shape and mixes what it reads with what attention
gave, this keeps keys and values themselves, merges the nearest when there are too many (`pipeline.ops.slots`), and
attention sees them under its own softmax. It works before any training. docs/attachments.md has the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.ops.attention_sinks import WindowCarry
from pipeline.ops.attention_slots import SlotPlan, slot_attention, slots_by_chunk
from pipeline.ops.attention_slots_native import takes
from pipeline.ops.gates import GateLinear
from pipeline.ops.importance import Importance, ImportanceLoss, importance_loss
from pipeline.ops.slots import SlotMaps, Slots
from pipeline.ops.store_slots import Backend
from pipeline.parallel.topology import Topology
from pipeline.systems.miras.config import MemoryConfig

IMPORTANCE_WEIGHT = 0.01
"""Of its loss, the mean over layers and key-value heads. Nothing else learns from it, and Adam's updates do not depend
on it: it keeps a gradient of ten times the others' norm from deciding where that is clipped."""


def slots_backend(
    config: MemoryConfig, attention: str, device: torch.device, dtype: torch.dtype
) -> Literal["sdpa", "flex", "native"]:
    """The backend of attention to slots by name, where `attention` is that of the other layers."""
    if attention != "sdpa":
        # Of the backends of a GPU this one alone can do it.
        return "flex"
    return "native" if config.backend != "torch" and takes(device, dtype, config.head_dim) else "sdpa"


class SlotHealth(NamedTuple):
    """Sums over this rank's streams and key-value heads, for the log."""

    used: Tensor
    """Slots that hold something."""
    slots: Tensor
    """All of them."""
    stored: Tensor
    """Tokens that they stand for."""
    importance: ImportanceLoss | None
    """In training, where tokens have an importance."""


class SlotBranch(nn.Module):
    """What is learned of a layer's slots; at first they are read as they are.

    Per key-value head, k_s and v_s are read as k_s + k_s D_k and v_s + v_s D_v; per head and token, w x_t + u q_t + b
    is added to the logits of all slots. With importance, tokens have the weights of
    `Importance.weights` where slots merge. All of it is zero at first.
    """

    def __init__(self, width: int, kv_heads: int, config: MemoryConfig, norm_eps: float) -> None:
        super().__init__()
        self.config, self.norm_eps = config, norm_eps
        self.shift_proj = GateLinear(width, config.heads)
        self.shift_query = nn.Parameter(torch.empty(config.heads, config.head_dim))
        self.key_map = nn.Parameter(torch.empty(kv_heads, config.head_dim, config.head_dim))
        self.value_map = nn.Parameter(torch.empty(kv_heads, config.head_dim, config.head_dim))
        weighs = config.slots.importance
        self.importance_key = nn.Parameter(torch.empty(kv_heads, config.head_dim)) if weighs else None
        self.importance_value = nn.Parameter(torch.empty(kv_heads, config.head_dim)) if weighs else None

    @property
    def backend(self) -> Backend:
        """Of `pipeline.ops.store_slots`, which has no kernel for GPUs."""
        return "torch" if self.config.backend == "torch" else "auto"

    def shift(self, hidden: Tensor) -> Tensor:
        """Of hidden [batch, sequence / degree, width]: [batch, sequence / degree, heads, 1] float32."""
        shift: Tensor = self.shift_proj(hidden, self.norm_eps)
        return shift[..., None]

    def forward(
        self,
        shift: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: SlotPlan,
        window: WindowCarry | None,
        carry: Slots | None,
        topology: Topology,
        scale: float,
    ) -> tuple[Tensor, Slots, SlotHealth]:
        """Attention in place of that to the window alone: of `shift` [batch, sequence, heads / degree, 1], attention's
        q, k (before RoPE), v [batch, sequence, heads or key-value heads / degree, dim], and what the layer carries, the
        output like q, the slots after the step, and the health."""
        if carry is None:
            carry = Slots.empty(k.shape[0], k.shape[2], self.config.slots.count, k.shape[3], k)
        importance, loss = self.importance(topology), None
        found = slots_by_chunk(k, v, plan, window, carry, importance, self.backend)
        if importance is not None and self.training and torch.is_grad_enabled():
            loss = importance_loss(
                importance, q, k, v, plan.rotation, plan.segment_ids, plan.kept,
                window=plan.window, reach=plan.reach, scale=scale,
            )  # fmt: skip
        out = slot_attention(q, k, v, plan, window, found, self.maps(topology), shift.squeeze(-1), scale)
        return out, found.after, slot_health(found.after, loss)

    def maps(self, topology: Topology) -> SlotMaps:
        """How this rank's slots are read."""
        own = topology.heads(self.key_map.shape[0])
        return SlotMaps(self.key_map[own], self.value_map[own], self.shift_query[topology.heads(self.config.heads)])

    def importance(self, topology: Topology) -> Importance | None:
        """What this rank's tokens weigh; None where they are alike."""
        if self.importance_key is None or self.importance_value is None:
            return None
        own = topology.heads(self.importance_key.shape[0])
        return Importance(self.importance_key[own], self.importance_value[own])


def slot_health(slots: Slots, importance: ImportanceLoss | None) -> SlotHealth:
    used = slots.counts > 0
    return SlotHealth(used.sum(), used.new_full((), used.numel(), dtype=torch.float64), slots.counts.sum(), importance)


def slot_metrics(health: Sequence[SlotHealth]) -> dict[str, tuple[Tensor, Tensor]]:
    """The health of all slots of a step, each metric as (sum, count); none without any."""
    if not health:
        return {}
    used, slots, stored = (
        torch.stack([getattr(state, name) for state in health]).sum() for name in ("used", "slots", "stored")
    )
    found = {"memory/slots_used": (used, slots), "memory/tokens_per_slot": (stored, used.clamp_min(1))}
    if losses := importance_losses(health):
        nats, attention = (torch.stack(list(sums)).sum() for sums in zip(*(loss[1:] for loss in losses), strict=True))
        found["memory/importance_nats"] = (nats, attention)
    return found


def importance_surrogate(health: Sequence[object], kv_heads: int) -> Tensor | float:
    """0, for the sum of a loss over tokens: what importance learns from, the mean over layers and key-value heads."""
    slots = [state for state in health if isinstance(state, SlotHealth)]
    summed = sum(loss.surrogate for loss in importance_losses(slots))
    return IMPORTANCE_WEIGHT / (kv_heads * max(1, len(slots))) * summed


def importance_losses(health: Sequence[SlotHealth]) -> list[ImportanceLoss]:
    return [state.importance for state in health if state.importance is not None]
