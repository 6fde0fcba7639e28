"""The state of streams as the engine keeps it between steps: named tensors, rows first in each."""

from __future__ import annotations

from pipeline.system import Carry, CarryEntry
from pipeline.systems.neuromorphic.state import StreamState
from pipeline.systems.neuromorphic.stream_tensors import named, stream_state


def pack_carry(state: StreamState) -> Carry:
    """A flat, named carry of a state, such as `procedural.keys`; every entry is of whole streams."""
    return {name: CarryEntry(tensor) for name, tensor in named(state).items()}


def unpack_carry(carry: Carry) -> StreamState | None:
    """The inverse of `pack_carry`; None when there is nothing yet."""
    return stream_state({name: entry.tensor for name, entry in carry.items()}) if carry else None
