"""What the memories of all attachments share when they take one token per row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.ops.gates import Gates
from pipeline.ops.slots import Slots
from pipeline.systems.miras.config import MemoryConfig
from pipeline.systems.miras.decoding.state import MemoryState
from pipeline.systems.miras.inside import LayerCarry
from pipeline.systems.miras.memory import MemoryCarry
from pipeline.systems.miras.rule_step import rule_step
from pipeline.systems.miras.rules import MemoryRule, State
from pipeline.systems.miras.step_state import StepState


class RulePass(NamedTuple):
    """A parallel pass of a rule over the first tokens of a chunk: (M, S) before and after it, and its gates."""

    before: State
    after: State
    gates: Gates


class LayerSteps(ABC):
    """One layer's memory, whatever it is."""

    def __init__(self, config: MemoryConfig) -> None:
        self.config = config

    @property
    @abstractmethod
    def grain(self) -> int:
        """A parallel pass that goes on has to begin at a multiple of so many tokens."""

    @abstractmethod
    def empty(self, rows: int, like: Tensor) -> MemoryState:
        """Before any token; `like` has the model's dtype and device."""

    @abstractmethod
    def carry(self, state: MemoryState, length: int) -> MemoryCarry | Slots:
        """What a parallel pass goes on with, of rows of `length` tokens each, at least one."""

    @abstractmethod
    def loaded(self, left: LayerCarry, length: int, within: RulePass | None, before: LayerCarry | None) -> MemoryState:
        """The state after a parallel pass that left rows of `length` tokens each; `within`: it took the first tokens of
        a chunk, and no others. `before`: the carry that it began with."""


class MemorySteps(LayerSteps):
    """One layer's memory, of a module whose rule and momentum logits are given."""

    def __init__(self, config: MemoryConfig, rule: MemoryRule, eta_logits: nn.Parameter | None) -> None:
        super().__init__(config)
        self.module = rule
        self.eta_logits = eta_logits
        self.rule = rule_step(rule)
        self.heads = slice(0, config.heads)

    @property
    def grain(self) -> int:
        return self.config.chunk_start or 1

    def loaded(self, left: LayerCarry, length: int, within: RulePass | None, before: LayerCarry | None) -> MemoryState:
        assert isinstance(left.memory, MemoryCarry)
        return self.taken_over(left.memory, length, within)

    @abstractmethod
    def taken_over(self, carry: MemoryCarry, length: int, within: RulePass | None) -> MemoryState:
        """As `loaded`, of the memory's own carry."""

    def begin(self, rows: int, like: Tensor) -> StepState:
        """The rule's state before any token."""
        return self.rule.begin(self.module.empty_state(rows, self.heads, like))

    def write(self, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: StepState) -> Tensor:
        """A step of the rule with everything [rows, 1, heads, ...], and what it reads alike."""
        q, k, v, alpha, beta = (x.squeeze(1) for x in (q, k, v, alpha, beta))
        return self.rule.step(q, k, v, alpha, beta, self.eta_logits, state).unsqueeze(1)

    def running(self, state: State, within: RulePass | None) -> StepState:
        """The rule's state after a parallel pass, as `loaded` has it."""
        return self.rule.begin(state) if within is None else self.rule.begin_within(*within)


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
