"""Which fields a command line gives itself, as tyro reads it: a flag under any spelling, also with the default's value.

A config alone does not tell: a value that was typed may be the one that stands by default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Annotated, Any

from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructFieldSpec,
)

from pipeline.commands.flag_help import changed_fields, leaves


def recording(default: Any, names: Collection[str], given: set[str]) -> ConstructorRegistry:
    """Rules for `tyro.cli` that parse as its own do, and add to ``given`` those of ``names`` whose flags are there.

    ``default`` is the dataclass that is parsed over; ``names`` are dotted names of fields in it, none of them a switch,
    whose flag takes no value.
    """
    recorded = {(leaf.owner, leaf.name.rpartition(".")[2]): leaf.name for leaf in leaves(default) if leaf.name in names}
    assert len(recorded) == len(names), "a field that is not there, or a section that is there twice"

    def field(owner: type, part: StructFieldSpec) -> StructFieldSpec:
        name = recorded.get((owner, part.name))
        return part if name is None else _recorded(part, name, given)

    return changed_fields(field)


def _recorded(part: StructFieldSpec, name: str, given: set[str]) -> StructFieldSpec:
    """The field, with tyro's own conversion of its words and a note that there were some."""
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(part.type, set()))
    assert isinstance(spec, PrimitiveConstructorSpec), f"{name} has no flag"
    convert = spec.instance_from_str

    def converted(words: list[str]) -> Any:
        given.add(name)
        return convert(words)

    noted: Any = Annotated[part.type, dataclasses.replace(spec, instance_from_str=converted)]
    return dataclasses.replace(part, type=noted)
