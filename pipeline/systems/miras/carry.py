"""The carry of the miras system between steps: a flat mapping of named tensors, as the engine keeps and saves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.ops.attention import WindowCarry
from pipeline.ops.slots import Slots
from pipeline.system import Carry, CarryEntry
from pipeline.systems.miras.inside import LayerCarry
from pipeline.systems.miras.memory import MemoryCarry

# Where the heads are in each carried tensor; the others are whole on every sequence rank.
_HEADS = {
    "attention.k": 2,
    "attention.v": 2,
    "attention.sink_k": 2,
    "attention.sink_v": 2,
    "memory.memory": 1,
    "memory.momentum": 1,
    "memory.tail": 2,
    "memory.keys": 1,
    "memory.values": 1,
    "memory.counts": 1,
    "memory.ages": 1,
    "memory.weights": 1,
}


def pack_carry(layers: Sequence[LayerCarry]) -> Carry:
    """A flat, named carry of the layers' states: `LAYER.attention.k` and so on."""
    carry: Carry = {}
    for index, layer in enumerate(layers):
        for part, state in zip(LayerCarry._fields, layer, strict=True):
            for field, tensor in zip(state._fields, state, strict=True) if state is not None else ():
                carry[f"{index}.{part}.{field}"] = CarryEntry(tensor, heads=_HEADS.get(f"{part}.{field}"))
    return carry


def unpack_carry(carry: Mapping[str, CarryEntry], layers: int) -> list[LayerCarry] | None:
    """The inverse of `pack_carry`; None when there is nothing yet."""
    if not carry:
        return None

    def part(index: int, name: str, kind: Any) -> Any:
        fields = [carry.get(f"{index}.{name}.{field}") for field in kind._fields]
        if kind is Slots and fields[-1] is None:
            # A carry from before slots had weights: every token weighed 1.
            fields[-1] = fields[Slots._fields.index("counts")]
        return None if fields[0] is None else kind(*(entry.tensor for entry in fields if entry is not None))

    return [
        LayerCarry(
            part(index, "attention", WindowCarry), part(index, "memory", MemoryCarry) or part(index, "memory", Slots)
        )
        for index in range(layers)
    ]
