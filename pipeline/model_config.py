"""The base of the systems' sections of RunConfig, which an exported model's code holds too: no command line is needed.

A field that no flag sets has the type `Suppress[...]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeVar

from pipeline.errors import UserError, shown
from pipeline.units import LARGEST

T = TypeVar("T")
try:
    from tyro.conf import Suppress
except ModuleNotFoundError:  # beside an exported model there are no flags, and need be no tyro
    Suppress = Annotated[T, None]  # type: ignore[misc]

MAY_CHANGE: Mapping[str, bool] = {"may_change_at_resume": True}
"""Metadata of a field of a model's section that leaves the model the same, such as a choice of backend: a resume does
not compare it."""


@dataclass(frozen=True)
class ModelConfig:
    """What a system is made of. Each system derives its own section from this one.

    A resume compares all fields but those with the metadata MAY_CHANGE and those that the section they are in names in
    a property `ignored_fields`, since they mean nothing beside its other values.
    """

    common: ClassVar[tuple[str, ...]] = ()
    """Dotted names of the fields whose flags `train RECIPE --help` shows; `--help-all` shows all."""
    own_steps: ClassVar[tuple[str, ...]] = ()
    """Fields with the steps of one phase, None for those of --steps: this flag, where a person gives it, takes the
    place of a recipe's."""
    system: Suppress[str] = ""
    """Name of the folder under pipeline/systems that implements this section."""


def at_least(least: int, section: object, name: str, *fields: str) -> None:
    """Raises UserError where one of the fields of a model's section lies below `least` or above what any size is;
    `name` is the section's in flags, `memory.mlp`; empty: the model's own."""
    for key in fields:
        value = getattr(section, key)
        if not least <= value <= LARGEST:
            fix = f"give {least} or more" if value < least else f"give at most {LARGEST}"
            flag = ".".join(part for part in ("--model", name, key.replace("_", "-")) if part)
            raise UserError(f"{flag} is {shown(value)}: {fix}")
