"""A token per row through a memory branch: the attachments `residual`, `mal` and `mag`."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.ops.convolution import causal_convolution
from pipeline.systems.miras.decoding.state import MemoryState
from pipeline.systems.miras.decoding.steps import MemorySteps, RulePass
from pipeline.systems.miras.memory import MemoryBranch, MemoryCarry, unit_keys

TAIL = "tail"
"""The last conv - 1 tokens before the convolution [rows, conv - 1, heads, 3 dim], zeros where there are none."""


class BranchSteps(MemorySteps):
    """The memory branch of one layer."""

    def __init__(self, branch: MemoryBranch) -> None:
        super().__init__(branch.config, branch.rule, branch.eta_logits)
        self.branch = branch

    def empty(self, rows: int, like: Tensor) -> MemoryState:
        config = self.config
        tail = like.new_zeros(rows, config.conv - 1, config.heads, 3 * config.head_dim)
        return MemoryState(self.begin(rows, like), {TAIL: tail})

    def step(self, hidden: Tensor, state: MemoryState) -> Tensor:
        """What the memory adds to hidden [rows, 1, width], or gates it with."""
        branch, tail = self.branch, state.kept[TAIL]
        normed, qkv, logits = branch.inputs(hidden)
        tokens = torch.cat([tail, qkv], dim=1)
        one_document = torch.zeros(1, tokens.shape[1], dtype=torch.int64, device=tokens.device)
        q, k, v = unit_keys(causal_convolution(tokens, one_document, branch.conv), self.config)
        tail.copy_(tokens[:, 1:])
        read = self.write(q, k, v, logits[..., 0], logits[..., 1], state.rule_state)
        return branch.output(branch.found(read, q, self.heads), normed)

    def carry(self, state: MemoryState, length: int) -> MemoryCarry:
        tail = state.kept[TAIL]
        ids = torch.zeros(tail.shape[:2], dtype=torch.int64, device=tail.device)
        ids[:, : max(0, tail.shape[1] - length)] = -1
        return MemoryCarry(*self.rule.finish(state.rule_state), tail, ids)

    def taken_over(self, carry: MemoryCarry, length: int, within: RulePass | None) -> MemoryState:
        running = self.running((carry.memory, carry.momentum), within)
        return MemoryState(running, {TAIL: carry.tail.clone()})
