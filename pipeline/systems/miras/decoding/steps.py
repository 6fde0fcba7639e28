"""What the memories of all attachments share when they take one token per row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.systems.miras.config import MemoryConfig
from pipeline.systems.miras.decoding.state import MemoryState
from pipeline.systems.miras.memory import MemoryCarry
from pipeline.systems.miras.rule_step import StepState, rule_step
from pipeline.systems.miras.rules import MemoryRule, State


class RuleCall(NamedTuple):
    """What a rule was called with in a parallel pass, [rows, tokens, heads, ...] each, and the state before it."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha_logits: Tensor
    beta_logits: Tensor
    eta_logits: Tensor | None
    state: State


class MemorySteps(ABC):
    """One layer's memory, of a module whose rule and momentum logits are given."""

    def __init__(self, config: MemoryConfig, rule: MemoryRule, eta_logits: nn.Parameter | None) -> None:
        self.config = config
        self.module = rule
        self.eta_logits = eta_logits
        self.rule = rule_step(rule)
        self.heads = slice(0, config.heads)

    @property
    def grain(self) -> int:
        """A parallel pass that goes on has to begin at a multiple of so many tokens."""
        return self.config.chunk_start or 1

    @abstractmethod
    def empty(self, rows: int, like: Tensor) -> MemoryState:
        """Before any token; `like` has the model's dtype and device."""

    @abstractmethod
    def carry(self, state: MemoryState, length: int) -> MemoryCarry:
        """What a parallel pass goes on with, of rows of `length` tokens each, at least one."""

    @abstractmethod
    def loaded(self, carry: MemoryCarry, length: int, call: RuleCall | None) -> MemoryState:
        """The state after a parallel pass that left rows of `length` tokens each. Where it ended within a chunk, `call`
        is what the rule was called with since the chunk's start."""

    def begin(self, rows: int, like: Tensor) -> StepState:
        """The rule's state before any token."""
        return self.rule.begin(self.module.empty_state(rows, self.heads, like))

    def write(self, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: StepState) -> Tensor:
        """A step of the rule with everything [rows, 1, heads, ...], and what it reads alike."""
        q, k, v, alpha, beta = (x.squeeze(1) for x in (q, k, v, alpha, beta))
        return self.rule.step(q, k, v, alpha, beta, self.eta_logits, state).unsqueeze(1)

    def after(self, call: RuleCall) -> StepState:
        """The rule's state after the tokens of a call, which began at a chunk's start."""
        state, count = call.state, call.q.shape[1]
        whole = count - count % (self.config.chunk_start or 1)
        if whole:
            q, k, v, alpha, beta = (x[:, :whole] for x in call[:5])
            _, state, _ = self.module(q, k, v, alpha, beta, call.eta_logits, state, None, self.heads)
        running = self.rule.begin(state)
        self.rule.write_tokens([x[:, whole:] for x in call[:5]], call.eta_logits, running)
        return running


def in_order(ring: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The tokens of a ring [rows, size, ...] after `length` of them, the last at the end; zeros where there were none.
    And their segment ids [rows, size]: 0, or -1 where there is no token."""
    size = ring.shape[1]
    count = min(length, size)
    positions = torch.arange(length - count, length, device=ring.device)
    tokens = ring.index_select(1, positions % size)
    ids = torch.zeros(ring.shape[:2], dtype=torch.int64, device=ring.device)
    ids[:, : size - count] = -1
    return F.pad(tokens, (0, 0) * (ring.dim() - 2) + (size - count, 0)), ids


def as_ring(tokens: Tensor, length: int) -> Tensor:
    """The inverse of `in_order`, of a ring as long as `tokens`."""
    size = tokens.shape[1]
    count = min(length, size)
    positions = torch.arange(length - count, length, device=tokens.device)
    return torch.zeros_like(tokens).index_copy_(1, positions % size, tokens[:, size - count :])
