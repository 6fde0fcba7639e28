"""The state of streams as named tensors, rows first in each, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.ops.attention import WindowCarry
from pipeline.systems.neuromorphic.state import EpisodicState, ProceduralState, StreamState

PARTS = {"working": WindowCarry, "procedural": ProceduralState, "episodic": EpisodicState}
State = TypeVar("State")


def _fields(part: Any) -> dict[str, Any]:
    if isinstance(part, WindowCarry):
        return part._asdict()
    return {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}


def named(state: Any) -> dict[str, Tensor]:
    """Every tensor of a state by its name, such as `procedural.keys`; of what is None there is none."""
    found: dict[str, Tensor] = {}
    for name, value in _fields(state).items():
        if isinstance(value, Tensor):
            found[name] = value
        elif value is not None:
            found |= {f"{name}.{inner}": tensor for inner, tensor in named(value).items()}
    return found


def stream_state(tensors: Mapping[str, Tensor]) -> StreamState:
    """The inverse of `named` for a `StreamState`."""
    parts: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if "." not in name}
    parts["working"] = None
    for part, kind in PARTS.items():
        inner = {
            name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")
        }
        if inner:
            parts[part] = kind(**inner)
    return StreamState(**parts)


def mapped(state: StreamState, change: Callable[[str, Tensor], Tensor]) -> StreamState:
    """The same with every tensor changed, by its name."""
    return stream_state({name: change(name, tensor) for name, tensor in named(state).items()})


def rows_of(state: StreamState, rows: Tensor) -> StreamState:
    """Copies of rows by index [rows] int64, on the state's device."""
    return mapped(state, lambda _, tensor: tensor.index_select(0, rows))


def with_rows(state: StreamState, rows: Tensor, others: StreamState) -> StreamState:
    """The state with those of `others` at rows by index [rows] int64."""
    found = named(others)
    return mapped(state, lambda name, tensor: tensor.index_copy(0, rows, found[name]))


def joined(states: Sequence[StreamState]) -> StreamState:
    """One state of all their rows, which all have a working memory or none."""
    found = [named(state) for state in states]
    return mapped(states[0], lambda name, _: torch.cat([tensors[name] for tensors in found]))
