"""The memories that work inside of attention, as one layer of a forward pass has them, and what its layers share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from pipeline.lm.attention import AttentionCall, Beside
from pipeline.ops.attention import WindowCarry
from pipeline.ops.attention_slots import SlotPlan
from pipeline.ops.slots import Slots
from pipeline.systems.miras.config import MemoryConfig
from pipeline.systems.miras.context_memory import ContextBranch, ContextTokens
from pipeline.systems.miras.memory import MemoryCarry, MemoryHealth
from pipeline.systems.miras.overflow import OverflowBranch, OverflowPlan
from pipeline.systems.miras.segments import SegmentPlan
from pipeline.systems.miras.slots import SlotBranch, SlotHealth

INSIDE = ("mac", "overflow", "slots")
"""Attachments that work inside of attention."""


class LayerCarry(NamedTuple):
    """What a stream carries from one step to the next at one layer; None where the layer has no such part."""

    attention: WindowCarry | None
    memory: MemoryCarry | Slots | None


class Step(NamedTuple):
    """What the layers of one forward pass share, and what their memories leave."""

    attention: AttentionCall
    segment_ids: Tensor
    """Documents as the memories know them."""
    before: list[LayerCarry]
    segments: SegmentPlan | None
    """For memories that are context of attention."""
    overflow: OverflowPlan | None
    """For memories of what leaves the window."""
    slots: SlotPlan | None
    """For slots; None too where they stay empty."""
    kinds: dict[int, MemoryConfig]
    """The memories that are in use, by layer."""
    memory: dict[int, tuple[MemoryCarry | Slots, MemoryHealth | SlotHealth]]


def beside_attention(branch: nn.Module, index: int, hidden: Tensor, step: Step) -> Beside:
    """What the memory `branch` of layer `index` does at its attention, of hidden [batch, sequence / degree, width]."""
    if isinstance(branch, ContextBranch):
        return _context(branch, index, hidden, step)
    if isinstance(branch, OverflowBranch):
        return _beyond(branch, index, hidden, step)
    assert isinstance(branch, SlotBranch)
    return _stored(branch, index, hidden, step)


def _context(branch: ContextBranch, index: int, hidden: Tensor, step: Step) -> Beside:
    """The memory of a layer as context of its attention, of hidden [batch, sequence / degree, width]."""
    segments = step.segments
    assert segments is not None

    def refine(q: Tensor, _: Tensor, v: Tensor, out: Tensor, scale: float, *tokens: Tensor) -> Tensor:
        carry, topology = own_carry(step.before[index].memory), step.attention.topology
        arguments = (ContextTokens(*tokens), q, v, out, step.segment_ids, segments, carry, topology, scale)
        refined, memory, health = branch.core(*arguments)
        step.memory[index] = (memory, health)
        return refined

    return Beside(tokens=branch.inputs(hidden), refine=refine)


def _beyond(branch: OverflowBranch, index: int, hidden: Tensor, step: Step) -> Beside:
    """The memory of a layer beyond the window of its attention, of hidden [batch, sequence / degree, width]."""
    plan = step.overflow
    assert plan is not None

    def refine(q: Tensor, k: Tensor, v: Tensor, out: Tensor, _: float, logits: Tensor) -> Tensor:
        before = step.before[index]
        layer_before = (before.attention, own_carry(before.memory))
        arguments = (logits, q, k, v, out, plan, layer_before, step.attention.topology)
        refined, memory, health = branch.core(*arguments)
        step.memory[index] = (memory, health)
        return refined

    return Beside(tokens=[branch.inputs(hidden)], refine=refine)


def _stored(branch: SlotBranch, index: int, hidden: Tensor, step: Step) -> Beside:
    """The slots of a layer behind the window of its attention, of hidden [batch, sequence / degree, width]."""
    plan = step.slots
    if plan is None:
        return Beside()
    slot_plan = plan

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, shift: Tensor) -> Tensor:
        window, slots = step.before[index]
        assert slots is None or isinstance(slots, Slots)
        out, *left = branch(shift, q, k, v, slot_plan, window, slots, step.attention.topology, scale)
        step.memory[index] = (left[0], left[1])
        return out

    return Beside(tokens=[branch.shift(hidden)], attention=attention)


def own_carry(carry: MemoryCarry | Slots | None) -> MemoryCarry | None:
    """The carry of a memory that has a rule."""
    assert not isinstance(carry, Slots)
    return carry
