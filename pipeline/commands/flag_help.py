"""The flags of a dataclass: their names, and their help, in full or the most used ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, NamedTuple, NoReturn, get_args, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from pipeline.config import RunConfig

COMMON = (
    "steps", "stop_after", "seed", "output_dir", "resume", "init_from", "save_every", "keep", "eval_every",
    "run_name", "run_id",
    "batch_size", "sequence_length", "grad_accum", "lr", "warmup_steps", "weight_decay", "clip", "precision",
    "activation_checkpointing", "compile", "profile", "dry_run", "zero", "parallel.sequence",
    "data.path", "data.dataset", "data.mix", "data.tokens", "data.text_field", "data.tokenizer", "data.min_tokens",
)  # fmt: skip
"""Fields of every run whose flags `--help` shows; a model names its own (`ModelConfig.common`)."""


def common_fields(config: RunConfig) -> set[str]:
    """Dotted names of the fields whose flags are shown without `--help-all`."""
    return {*COMMON, *(f"model.{name}" for name in config.model.common)}


class Leaf(NamedTuple):
    """A field that is not a section itself."""

    name: str
    """Dotted, from the whole config on."""
    owner: type
    """The section's class, which has it under the last part of its name."""
    hint: Any
    value: Any


def leaves(section: Any, prefix: str = "") -> Iterator[Leaf]:
    """The fields of a dataclass and of the sections in it."""
    hints = get_type_hints(type(section), include_extras=True)
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield Leaf(f"{prefix}{field.name}", type(section), hints[field.name], value)


def flag_names(*sections: Any) -> list[str]:
    """Every flag of dataclasses, with aliases and the `--no-` of switches."""
    names = []
    for section in sections:
        for name, _, hint, value in leaves(section):
            details = getattr(hint, "__metadata__", ())
            # A section that a recipe leaves out has no flags, nor is it one.
            absent = any(isinstance(kind, type) and dataclasses.is_dataclass(kind) for kind in get_args(hint))
            if absent or tyro.conf.Suppress in details:
                continue
            aliases = [alias for detail in details for alias in getattr(detail, "aliases", None) or ()]
            flags = [f"--{name.replace('_', '-')}", *aliases]
            names += flags
            if isinstance(value, bool):
                long = (flag for flag in flags if flag.startswith("--"))
                parts = (flag.removeprefix("--").rpartition(".") for flag in long)
                names += [f"--{head}{dot}no-{last}" for head, dot, last in parts]
    return names


def show_help(default: Any, program: str, *, everything: bool, own: Any = None, description: str = "") -> NoReturn:
    """Prints the help of a dataclass's flags, and of a command's `own` before them; exits with code 0.

    Of a run only the common flags are shown, without their aliases, unless `everything` is asked for.
    """
    notes = [description] if description else []
    hidden: set[tuple[type, str]] = set()
    if isinstance(default, RunConfig) and not everything:
        common = common_fields(default)
        hidden = {(leaf.owner, leaf.name.rpartition(".")[2]) for leaf in leaves(default) if leaf.name not in common}
        notes.append("The most used flags; --help-all lists every one, and --config FILE takes a run's config.yaml.")
    command, value = type(default), default
    if own is not None:
        # Two sections without a prefix: tyro then shows them as one.
        fields = {"own": own, "run": default}
        unnamed = [(name, Annotated[type(part), tyro.conf.arg(name="")]) for name, part in fields.items()]
        command = dataclasses.make_dataclass("Command", unnamed)
        value = command(**fields)
    tyro.cli(
        command,
        default=value,
        args=["--help"],
        prog=program,
        description="\n\n".join(notes) or None,
        config=(tyro.conf.AvoidSubcommands,),
        registry=_registry(hidden),
    )
    raise SystemExit(0)


def changed_fields(change: Callable[[type, StructFieldSpec], StructFieldSpec]) -> ConstructorRegistry:
    """tyro's own rules, with `change(owner, field)` in the place of every field of a dataclass."""
    registry = ConstructorRegistry()
    # While tyro's own rule is asked for a type, this one is asked too.
    busy = False

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal busy
        if busy or not dataclasses.is_dataclass(info.type):
            return None
        busy = True
        try:
            found = ConstructorRegistry.get_struct_spec(info)
        finally:
            busy = False
        if not isinstance(found, StructConstructorSpec):
            return None
        return dataclasses.replace(found, fields=tuple(change(info.type, part) for part in found.fields))

    return registry


def _registry(hidden: set[tuple[type, str]]) -> ConstructorRegistry:
    """Rules of tyro's that leave out the flags in `hidden`, and aliases with them, and let docstrings flow."""

    def field(owner: type, part: StructFieldSpec) -> StructFieldSpec:
        kind: Any = part.type
        if (owner, part.name) in hidden:
            kind = Annotated[kind, tyro.conf.Suppress]
        elif hidden and any(getattr(detail, "aliases", None) for detail in getattr(kind, "__metadata__", ())):
            kind = kind.__origin__
        return dataclasses.replace(part, type=kind, helptext=partial(_one_paragraph, part.helptext))

    return changed_fields(field)


def _one_paragraph(text: str | Callable[[], str | None] | None) -> str | None:
    # A docstring's line breaks are those of the source.
    whole = text() if callable(text) else text
    return whole and " ".join(whole.split())
