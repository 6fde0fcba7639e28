"""What the decoder keeps of texts: per layer the keys and values that attention sees, and the memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pipeline.lm.decoding import DecodingState
from pipeline.ops.key_cache import KeyCache
from pipeline.ops.rope import Rope
from pipeline.systems.miras.step_state import StepState

LENGTHS = "lengths"
RUNNING = "running."


@dataclass
class MemoryState:
    """One layer's memory of all rows."""

    running: StepState | None
    """Of its rule, as the last token left it; None of slots, which have none."""
    kept: dict[str, Tensor]
    """What the attachment needs besides, rows first in each."""
    made: dict[str, Tensor] = field(default_factory=dict)
    """What it has made of these, and makes again where it is missing: not of a copy, and not in a file."""

    def tensors(self) -> dict[str, Tensor]:
        running = {} if self.running is None else self.running.tensors()
        return {**self.kept, **{RUNNING + name: tensor for name, tensor in running.items()}}

    @property
    def rule_state(self) -> StepState:
        """`running`, of a memory with a rule."""
        assert self.running is not None
        return self.running

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> MemoryState:
        """The same with every tensor changed, by its name."""
        running = None
        if self.running is not None:
            parts = self.running.tensors()
            running = StepState(**{name: change(RUNNING + name, tensor) for name, tensor in parts.items()})
        return MemoryState(running, {name: change(name, tensor) for name, tensor in self.kept.items()})


@dataclass
class LayerState:
    """What one layer keeps."""

    attention: KeyCache
    memory: MemoryState | None


class MirasState(DecodingState):
    """The state of texts that a `MirasDecoder` reads."""

    def __init__(self, lengths: Tensor, layers: list[LayerState]) -> None:
        self._lengths = lengths
        self.layers = layers

    @property
    def rows(self) -> int:
        return self._lengths.shape[0]

    @property
    def lengths(self) -> Tensor:
        return self._lengths

    def tensors(self) -> dict[str, Tensor]:
        found = {LENGTHS: self._lengths}
        for index, layer in enumerate(self.layers):
            parts = {"attention": layer.attention.tensors(self._lengths)}
            if layer.memory is not None:
                parts["memory"] = layer.memory.tensors()
            found |= {f"{index}.{part}.{name}": x for part, named in parts.items() for name, x in named.items()}
        return found

    def select(self, rows: Tensor) -> MirasState:
        """Copies of rows by index [rows] int64."""
        rows = rows.cpu()

        def take(_: str, x: Tensor) -> Tensor:
            return x.index_select(0, rows.to(x.device))

        layers = [
            LayerState(
                layer.attention.select(rows.to(layer.attention.keys.device)),
                None if layer.memory is None else layer.memory.mapped(take),
            )
            for layer in self.layers
        ]
        return MirasState(self._lengths[rows], layers)

    @staticmethod
    def join(states: Sequence[MirasState]) -> MirasState:
        """One state of all their rows."""
        layers = []
        for parts in zip(*(state.layers for state in states), strict=True):
            memories = [part.memory for part in parts if part.memory is not None]
            memory = None
            if memories:
                memory = memories[0].mapped(partial(_joined, [memory.tensors() for memory in memories]))
            layers.append(LayerState(KeyCache.join([part.attention for part in parts]), memory))
        return MirasState(torch.cat([state.lengths for state in states]), layers)

    def restored(self, tensors: Mapping[str, Tensor], lengths: Tensor, rope: Rope) -> MirasState:
        """The state that gave these tensors; this one is an empty one of as many rows.

        Raises ValueError for what is not of this model, and names the tensor.
        """
        rest = {name: x for name, x in tensors.items() if name != LENGTHS}

        def take(name: str, like: Tensor) -> Tensor:
            if name not in rest:
                raise ValueError(f"{name} is missing")
            x = rest.pop(name)
            if x.dtype != like.dtype:
                raise ValueError(f"{name} is {x.dtype}; expected {like.dtype}")
            return x

        def take_alike(prefix: str, name: str, like: Tensor) -> Tensor:
            x = take(prefix + name, like)
            if x.shape != like.shape:
                raise ValueError(f"{prefix}{name} is {list(x.shape)}; expected {list(like.shape)}")
            return x.to(like.device, copy=True)

        layers = []
        for index, layer in enumerate(self.layers):
            prefix = f"{index}.attention."
            named = {name: take(prefix + name, layer.attention.keys) for name in ("keys", "values")}
            try:
                attention = layer.attention.restored(named, lengths, rope)
            except ValueError as error:
                raise ValueError(f"{prefix}{error}") from None
            memory = layer.memory
            if memory is not None:
                memory = memory.mapped(partial(take_alike, f"{index}.memory."))
            layers.append(LayerState(attention, memory))
        if rest:
            raise ValueError(f"{min(rest)} is nothing that this model keeps")
        return MirasState(lengths.clone(), layers)

    def advance(self, tokens: int) -> None:
        """Counts tokens that every row has read."""
        self._lengths += tokens

    def become(self, other: MirasState) -> None:
        """Takes over all of another state, in place."""
        self._lengths, self.layers = other._lengths, other.layers


def _joined(parts: Sequence[Mapping[str, Tensor]], name: str, _: Tensor) -> Tensor:
    return torch.cat([part[name] for part in parts])
