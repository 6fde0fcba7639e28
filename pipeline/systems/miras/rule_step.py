"""One token at a time: the memory rules as decoding runs them, with the same maths as `MemoryRule.forward`.

A chunk-start rule takes the gradients of a chunk at the memory that its first token finds, so its steps remember that
memory until the chunk is full. Rows may be at different places of their chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from pipeline.ops.checks import sum_dtype
from pipeline.ops.dual_maps import shrink
from pipeline.ops.gates import Gates, bounded_gates
from pipeline.ops.memory_step import memory_step
from pipeline.ops.memory_step_torch import write_
from pipeline.ops.mlp_scan import gelu
from pipeline.ops.muon import newton_schulz
from pipeline.ops.scan import Backend
from pipeline.ops.swiglu_scan import Weights, apply_swiglu, ascent, moved_weights, renormalise
from pipeline.systems.miras.rules import DualRule, ExactRule, MemoryRule, MlpRule, State, SwigluRule

RuleT = TypeVar("RuleT", bound=MemoryRule)


class StepState(NamedTuple):
    """What the memories of one layer keep between tokens; None is what the rule has no need of. Float32, or float64 of
    a model in float64."""

    memory: Tensor
    """M [rows, heads, state rows, dim]."""
    momentum: Tensor
    """S, like memory."""
    place: Tensor | None = None
    """[rows] int64 on the CPU: tokens of the present chunk so far, 0 at a border."""
    start: Tensor | None = None
    """Like memory: what the chunk's gradients are taken at (a matrix behind its link; whole weights of a deep memory).
    Of no meaning at a border."""
    gathered: Tensor | None = None
    """Like memory: the sum of the chunk's gradients, of a rule that writes at the chunk's end (swiglu); 0 at a
    border."""
    gates: Tensor | None = None
    """[rows, heads, 2] of such a rule: the sum of the chunk's eta and the product of its 1 - alpha; (0, 1) at a
    border."""

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name; `StepState(**tensors)` is the inverse."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}


class RuleStep(ABC, Generic[RuleT]):
    """The memories of one layer, all heads of it, a token at a time. Reads the rule's parameters anew every time."""

    def __init__(self, rule: RuleT) -> None:
        self.rule = rule
        self.heads = slice(0, rule.config.heads)
        self.chunk = rule.config.chunk_start
        self._empty: State | None = None

    def begin(self, state: State) -> StepState:
        """The state of rows that are all at a chunk's border, from (M, S) of the parallel pass, copied."""
        memory, momentum = (part.detach().clone(memory_format=torch.contiguous_format) for part in state)
        if self.chunk is None:
            return StepState(memory, momentum)
        place = torch.zeros(memory.shape[0], dtype=torch.int64, device="cpu")
        return StepState(memory, momentum, place, torch.zeros_like(memory))

    @torch.no_grad()
    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alpha_logits: Tensor,
        beta_logits: Tensor,
        eta_logits: Tensor | None,
        state: StepState,
    ) -> Tensor:
        """Write a token per row and read after (swiglu: before) it; `state` is changed in place.

        q, k [rows, heads, dim] of unit length, v alike; alpha_logits, beta_logits [rows, heads]; eta_logits [heads],
        None for a rule without momentum. Returns the reads, like v.
        """
        rule = self.rule
        if (eta_logits is not None) != rule.config.has_momentum:
            raise ValueError(f"the rule {rule.config.rule} {'has' if rule.config.has_momentum else 'has no'} momentum")
        gates = bounded_gates(alpha_logits, beta_logits, eta_logits, rule.step, rule.config.stretch)
        with torch.autocast(device_type=q.device.type, enabled=False):
            read = self._step(q, k, v, gates, state)
            if rule.empty_read:
                read = read - self._read_empty(q)
        return read.to(v.dtype)

    @torch.no_grad()
    def write_tokens(self, tokens: Sequence[Tensor], eta_logits: Tensor | None, state: StepState) -> None:
        """Write several tokens per row without reading: q, k, v, alpha_logits and beta_logits of `step`, [rows, tokens,
        heads, ...] each. They begin at a border and fill no chunk."""
        for place in range(tokens[0].shape[1]):
            q, k, v, alpha_logits, beta_logits = (x[:, place] for x in tokens)
            self.step(q, k, v, alpha_logits, beta_logits, eta_logits, state)

    def border(self, state: StepState) -> Tensor:
        """[rows] bool on the CPU: whether a parallel pass could go on here."""
        if state.place is None:
            return torch.ones(state.memory.shape[0], dtype=torch.bool, device="cpu")
        return state.place == 0

    def close(self, state: StepState, rows: Tensor | None = None) -> None:
        """End the present chunk early, of all rows or of those where rows [rows] bool on the CPU is true, as the end of
        a parallel pass does."""
        if state.place is not None:
            ended = ~self.border(state)
            self._end(state, ended if rows is None else ended & rows)

    def finish(self, state: StepState) -> State:
        """(M, S) for a parallel pass that goes on, not copied. Raises ValueError where a row is within a chunk."""
        if not bool(self.border(state).all()):
            raise ValueError("a row is within a chunk, whose gradients belong to the memory of its start")
        return state.memory, state.momentum

    @abstractmethod
    def _step(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: StepState) -> Tensor:
        """Raw reads [rows, heads, dim]."""

    def _eta(self, gates: Gates) -> Tensor | None:
        return gates.eta if self.rule.config.has_momentum else None

    def _recall(self, q: Tensor, state: State) -> Tensor:
        return self.rule.recall(q.unsqueeze(1), state, self.heads).squeeze(1)

    def _read_empty(self, q: Tensor) -> Tensor:
        dtype = sum_dtype(q)
        if self._empty is None or self._empty[0].dtype != dtype or self._empty[0].device != q.device:
            self._empty = self.rule.empty_state(1, self.heads, q)
        return self._recall(q, self._empty)

    def _take_starts(self, state: StepState) -> Tensor:
        """The memory at each row's chunk's start; that of rows which begin a chunk is made here."""
        assert state.place is not None and state.start is not None
        new = state.place == 0
        if bool(new.all()):
            state.start.copy_(self._start(state.memory))
        elif bool(new.any()):
            index = new.nonzero().squeeze(1).to(state.memory.device)
            state.start.index_copy_(0, index, self._start(state.memory.index_select(0, index)))
        return state.start

    def _start(self, memory: Tensor) -> Tensor:
        """`StepState.start` of M [rows, heads, state rows, dim]."""
        raise NotImplementedError

    def _advance(self, state: StepState) -> None:
        """A token more in every row's chunk; what is full ends."""
        assert state.place is not None
        state.place.add_(1)
        self._end(state, state.place == self.chunk)

    def _end(self, state: StepState, rows: Tensor) -> None:
        """Chunks end in rows [rows] bool on the CPU."""
        assert state.place is not None
        state.place.masked_fill_(rows, 0)


class ExactStep(RuleStep[ExactRule]):
    """titans and delta."""

    def _step(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: StepState) -> Tensor:
        # A backend that training was asked to run on may not be there when its model is used.
        backend: Backend = "torch" if self.rule.config.backend == "torch" else "auto"
        gate = (gates.alpha, self._eta(gates), gates.theta)
        return memory_step(q, k, v, *gate, state.memory, state.momentum, backend=backend)


class DualStep(RuleStep[DualRule]):
    """moneta, yaad and memora."""

    def _start(self, memory: Tensor) -> Tensor:
        return memory if self.rule.link is None else self.rule.link(memory)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: StepState) -> Tensor:
        rule, start = self.rule, self._take_starts(state)
        key = k.to(start.dtype)
        threshold = rule.threshold(k.unsqueeze(1), self.heads)
        cut = None if threshold is None else threshold.squeeze(1).unsqueeze(-1)
        signal = rule.error((key.unsqueeze(-2) @ start).squeeze(-2) - v, cut)
        if rule.clip is not None:
            squared = key.square().sum(dim=-1, keepdim=True) * signal.square().sum(dim=-1, keepdim=True)
            signal = signal * shrink(squared, rule.clip)
        write_(key, signal, gates.alpha, self._eta(gates), gates.theta, state.memory, state.momentum)
        self._advance(state)
        return self._recall(q, (state.memory, state.momentum))


class MlpStep(RuleStep[MlpRule]):
    """mlp."""

    def _start(self, memory: Tensor) -> Tensor:
        return torch.cat([self.rule.w_in, self.rule.w_out], dim=-2).to(memory.dtype) + memory

    def _step(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: StepState) -> Tensor:
        below, above = self._take_starts(state).chunk(2, dim=-2)
        key = k.to(below.dtype)
        x, slope = gelu((below @ key.unsqueeze(-1)).squeeze(-1))
        error = (x.unsqueeze(-2) @ above).squeeze(-2) - v
        back = (above @ error.unsqueeze(-1)).squeeze(-1) * slope
        clip = self.rule.config.mlp.clip
        squared = key.square().sum(dim=-1, keepdim=True) * back.square().sum(dim=-1, keepdim=True)
        squared = squared + x.square().sum(dim=-1, keepdim=True) * error.square().sum(dim=-1, keepdim=True)
        factor = shrink(squared, clip)
        error, back = error * factor, back * factor
        memories, momenta = state.memory.chunk(2, dim=-2), state.momentum.chunk(2, dim=-2)
        for rows, columns, memory, momentum in zip((back, x), (key, error), memories, momenta, strict=True):
            write_(rows, columns, gates.alpha, self._eta(gates), gates.theta, memory, momentum)
        self._advance(state)
        return self._recall(q, (state.memory, state.momentum))


class SwigluStep(RuleStep[SwigluRule]):
    """swiglu: within a chunk the weights stay, and its gradients are gathered."""

    def begin(self, state: State) -> StepState:
        begun = super().begin(state)
        gates = begun.memory.new_zeros((*begun.memory.shape[:2], 2))
        gates[..., 1] = 1
        return begun._replace(gathered=torch.zeros_like(begun.memory), gates=gates)

    def _initial(self, dtype: torch.dtype) -> Weights:
        return Weights(*(w.to(dtype) for w in (self.rule.w_gate, self.rule.w_up, self.rule.w_down)))

    def _start(self, memory: Tensor) -> Tensor:
        return torch.cat(self._initial(memory.dtype), dim=-2) + memory

    def _step(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: StepState) -> Tensor:
        assert state.gathered is not None and state.gates is not None
        weights = Weights(*self._take_starts(state).chunk(3, dim=-2))
        dtype = state.memory.dtype
        read = apply_swiglu(q.to(dtype).unsqueeze(-2), weights).squeeze(-2)
        key, value = k.to(dtype).unsqueeze(-2), v.to(dtype).unsqueeze(-2)
        state.gathered.add_(torch.cat(ascent(key, value, gates.theta.unsqueeze(-1), weights), dim=-2))
        state.gates[..., 0].add_(gates.eta)
        state.gates[..., 1].mul_(1 - gates.alpha)
        self._advance(state)
        return read

    @torch.no_grad()
    def write_tokens(self, tokens: Sequence[Tensor], eta_logits: Tensor | None, state: StepState) -> None:
        # A chunk may have thousands of tokens, and their gradients are taken at the same weights.
        assert state.place is not None and state.gathered is not None and state.gates is not None
        _, k, v, alpha_logits, beta_logits = tokens
        gates = bounded_gates(alpha_logits, beta_logits, eta_logits, self.rule.step, self.rule.config.stretch)
        k, v, theta = (x.transpose(1, 2).to(state.memory.dtype) for x in (k, v, gates.theta))
        weights = Weights(*self._take_starts(state).chunk(3, dim=-2))
        state.gathered.add_(torch.cat(ascent(k, v, theta, weights), dim=-2))
        state.gates[..., 0].add_(gates.eta.sum(dim=1))
        state.gates[..., 1].mul_((1 - gates.alpha).prod(dim=1))
        state.place.add_(k.shape[2])

    def _end(self, state: StepState, rows: Tensor) -> None:
        if not bool(rows.any()):
            return
        assert state.place is not None and state.gathered is not None and state.gates is not None
        index = rows.nonzero().squeeze(1)
        count = state.place[index]
        index = index.to(state.memory.device)
        memory, momentum, update, gates = (
            x.index_select(0, index) for x in (state.memory, state.momentum, state.gathered, state.gates)
        )
        if self.rule.config.has_momentum:
            eta = gates[..., 0] / count.to(gates.device)[:, None]
            update = eta[..., None, None] * momentum + update
        steps = update.chunk(3, dim=-2)
        written = torch.cat([newton_schulz(step) for step in steps] if self.rule.config.swiglu.muon else steps, dim=-2)
        initial = self._initial(memory.dtype)
        moved = memory * gates[..., 1, None, None] + written
        after = renormalise(moved_weights(initial, moved), initial)
        offset = torch.cat([now - start for now, start in zip(after, initial, strict=True)], dim=-2)
        state.memory.index_copy_(0, index, offset)
        state.momentum.index_copy_(0, index, update)
        state.gathered.index_fill_(0, index, 0)
        state.gates[..., 0].index_fill_(0, index, 0)
        state.gates[..., 1].index_fill_(0, index, 1)
        super()._end(state, rows)


def rule_step(rule: MemoryRule) -> RuleStep:
    """The steps of a rule."""
    kinds: tuple[tuple[type[MemoryRule], type[RuleStep]], ...] = (
        (ExactRule, ExactStep),
        (DualRule, DualStep),
        (MlpRule, MlpStep),
        (SwigluRule, SwigluStep),
    )
    return next(step for kind, step in kinds if isinstance(rule, kind))(rule)
