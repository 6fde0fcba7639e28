"""One token per row through all layers of a `MirasModel`, with its memories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.lm.attention import Beside, layer_number
from pipeline.lm.backbone import UNROTATED
from pipeline.ops.key_cache import TokenPlan, plan_token
from pipeline.ops.rope import Rope
from pipeline.systems.miras.attachments import output_gate
from pipeline.systems.miras.context_memory import ContextTokens
from pipeline.systems.miras.decoding.branch import BranchSteps
from pipeline.systems.miras.decoding.context import ContextSteps
from pipeline.systems.miras.decoding.overflow import OverflowSteps
from pipeline.systems.miras.decoding.slots import SlotSteps, SlotTokenPlan
from pipeline.systems.miras.decoding.state import MirasState
from pipeline.systems.miras.decoding.steps import LayerSteps
from pipeline.systems.miras.model import MirasModel


@dataclass
class TokenCall:
    """Attention of one token per row, as the layers of one step share it."""

    plan: TokenPlan
    state: MirasState
    memories: Mapping[int, LayerSteps]
    slots: SlotTokenPlan | None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, beside: Beside
    ) -> Tensor:
        index = layer_number(module)
        layer, steps = self.state.layers[index], self.memories.get(index)
        if isinstance(steps, SlotSteps):
            assert layer.memory is not None and self.slots is not None
            arguments = (query, key, value, beside.tokens[0], layer.attention, self.plan, self.slots, layer.memory)
            return steps.attend(*arguments, scaling).transpose(1, 2)
        # Before the token takes its place.
        leaving = layer.attention.leaving(self.plan) if isinstance(steps, OverflowSteps) else None
        out = layer.attention.attend(query, key, value, self.plan, scaling).transpose(1, 2)
        memory, q = layer.memory, query.transpose(1, 2)
        if leaving is not None:
            assert isinstance(steps, OverflowSteps) and memory is not None
            out = steps.step(beside.tokens[0], q, leaving, out, self.plan, memory)
        elif isinstance(steps, ContextSteps):
            assert memory is not None
            tokens, v = ContextTokens(*beside.tokens), value.transpose(1, 2)
            out = steps.step(tokens, q, v, out, self.plan, self.state.lengths, memory, scaling)
        return out if beside.gate is None else out * beside.gate.view_as(out)


def run_token(
    model: MirasModel, memories: Mapping[int, LayerSteps], ids: Tensor, state: MirasState, rope: Rope
) -> Tensor:
    """Hidden states [rows, 1, width] of ids [rows]; the state takes the tokens in, all but their number."""
    decoder: Any = model.backbone.model
    hidden = decoder.embed_tokens(ids[:, None])
    cache = state.layers[0].attention
    plan = plan_token(state.lengths, rope=rope, window=cache.window, sinks=cache.sinks, like=hidden)
    slots = next((steps for steps in memories.values() if isinstance(steps, SlotSteps)), None)
    slot_plan = None if slots is None else slots.plan(plan, state.lengths, rope, hidden.dtype)
    call = TokenCall(plan, state, memories, slot_plan)
    for index, block in enumerate(decoder.layers):
        steps, memory = memories.get(index), state.layers[index].memory
        beside, added = Beside(), None
        if isinstance(steps, BranchSteps):
            assert memory is not None
            added = steps.step(hidden, memory)
            if steps.config.attachment == "mal":
                hidden, added = hidden + added, None
            elif steps.config.attachment == "mag":
                beside, added = Beside(output_gate(added)), None
        elif isinstance(steps, ContextSteps):
            beside = Beside(tokens=steps.inputs(hidden))
        elif isinstance(steps, OverflowSteps):
            beside = Beside(tokens=[steps.inputs(hidden)])
        elif isinstance(steps, SlotSteps):
            beside = Beside(tokens=[steps.branch.shift(hidden)])
        hidden = block(hidden, position_embeddings=UNROTATED, attention_call=call, beside=beside)
        hidden = hidden if added is None else hidden + added
    normed: Tensor = decoder.norm(hidden)
    return normed
