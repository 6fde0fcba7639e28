"""A token per row through a memory of what leaves the window: the attachment `overflow`."""

from __future__ import annotations

from torch import Tensor

from pipeline.ops.key_cache import TokenPlan
from pipeline.systems.miras.decoding.state import MemoryState
from pipeline.systems.miras.decoding.steps import MemorySteps, RulePass, as_ring, in_order
from pipeline.systems.miras.memory import MemoryCarry
from pipeline.systems.miras.overflow import OverflowBranch

LOGITS = "logits"
"""A ring of the window: logits of the step sizes, [rows, window, heads], the token of position p at p % window."""


class OverflowSteps(MemorySteps):
    """The overflow memory of one layer."""

    def __init__(self, branch: OverflowBranch, window: int, sinks: int) -> None:
        super().__init__(branch.core.config, branch.core.rule, branch.core.eta_logits)
        self.core = branch.core
        self.inputs = branch.inputs
        self.window = window
        self.sinks = sinks

    def empty(self, rows: int, like: Tensor) -> MemoryState:
        running = self.begin(rows, like)
        logits = running.memory.new_zeros(rows, self.window, self.config.heads)
        return MemoryState(running, {LOGITS: logits})

    def step(
        self,
        logits: Tensor,
        q: Tensor,
        leaving: tuple[Tensor, Tensor],
        attended: Tensor,
        plan: TokenPlan,
        state: MemoryState,
    ) -> Tensor:
        """Another output of attention, like `attended` [rows, 1, heads, dim]: of `OverflowInputs`' logits, queries q
        before RoPE, and the keys and values that leave the window [rows, 1, key-value heads, dim]."""
        ring = state.kept[LOGITS]
        slot = plan.positions % self.window
        beta = ring[plan.rows, slot][:, None]
        ring[plan.rows, slot] = logits[:, 0, :, 0]
        leaves = (plan.positions >= self.window + self.sinks)[:, None, None]
        queries, keys, values, alpha, beta = self.core.rule_inputs(q, *leaving, beta, leaves, self.heads)
        read = self.write(queries, keys, values, alpha, beta, state.rule_state)
        return self.core.mixed(read, attended, q, logits[..., 1], leaves, self.heads)

    def carry(self, state: MemoryState, length: int) -> MemoryCarry:
        tail, ids = in_order(state.kept[LOGITS], length)
        return MemoryCarry(*self.rule.finish(state.rule_state), tail[..., None], ids)

    def taken_over(self, carry: MemoryCarry, length: int, within: RulePass | None) -> MemoryState:
        running = self.running((carry.memory, carry.momentum), within)
        return MemoryState(running, {LOGITS: as_ring(carry.tail.squeeze(-1), length)})
