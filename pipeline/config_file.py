"""The resolved config as YAML: saved with every run and checkpoint, and run again with `--config`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pydantic
import yaml

from pipeline.config import RunConfig
from pipeline.errors import UserError, brief, shown

Foreign = Callable[[dict[str, Any], str], RunConfig | None]
"""Reads another trainer's file, of the content and what it is called in messages; None for what is none of them."""
LONGEST = 4096
"""Bytes of the longest path, and so of any text in a config."""
MOVED = {("model", "recall"): ("data", "recall")}
"""Places of keys in older files (section, key), and their places now."""


def to_plain(config: Any) -> dict[str, Any]:
    """A config, or a section of one, as plain YAML values."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return value

    return plain(dataclasses.asdict(config))


def save_config(config: RunConfig, path: Path) -> None:
    """Writes config.yaml."""
    path.write_text(yaml.safe_dump(to_plain(config), sort_keys=False))


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice instead of dropping the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{shown(key)} is given twice", node.value[place][0].start_mark
                )
        return super().construct_mapping(node, deep)


def load_config(path: Path, recipes: dict[str, Any], foreign: Foreign | None = None) -> RunConfig:
    """The config in a YAML file, over the defaults of the recipe that it names, or what `foreign` makes of one that
    names none. Raises UserError.

    Whether foreign code may run is for the flags of a command alone to say: a file can come from anywhere.
    """
    content = _read(path)
    name = content.get("recipe") if isinstance(content, dict) else None
    try:
        if foreign is not None and isinstance(content, dict) and "recipe" not in content:
            found = foreign(content, f"--config {path}")
            if found is not None:
                return found
        if not isinstance(name, str) or name not in recipes:
            raise UserError(f"--config {path}: `recipe` must name one of {', '.join(sorted(recipes))}")
        config = merge(recipes[name](), with_moved_keys(content, str(path)), str(path))
    except UserError as error:
        # What a section says of its own values names flags, not the file.
        raise error if str(path) in str(error) else UserError(f"--config {path}: {error}") from None
    return dataclasses.replace(config, data=dataclasses.replace(config.data, trust_remote_code=False))


def with_moved_keys(content: dict[str, Any], where: str) -> dict[str, Any]:
    """The content of a config.yaml, the keys of older versions moved to their present places.

    Raises UserError for a key that is given at both places. What is no section is left for others to refuse.
    """
    for (before, key), (section, name) in MOVED.items():
        old, new = content.get(before), content.get(section)
        new = {} if new is None else new
        if not isinstance(old, dict) or key not in old or not isinstance(new, dict):
            continue
        if name in new:
            raise UserError(f"{where}: {before}: {key} is now {section}: {name}, and both are given: keep the latter")
        rest = {other: value for other, value in old.items() if other != key}
        content = {**content, before: rest, section: {**new, name: old[key]}}
    return content


def states(path: Path, *keys: str) -> bool:
    """Whether a YAML file gives the field that `keys` lead to, which otherwise has its recipe's value."""
    content = _read(path)
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            return False
        content = content[key]
    return True


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_bytes().decode("utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"--config {path}: {reason}") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not a text file") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise UserError(f"--config {path}{line}: not YAML ({brief(error.problem)}): correct it") from None
    except (yaml.YAMLError, ValueError) as error:  # a character, a date or a number that is none
        raise UserError(f"--config {path}: not YAML ({brief(error)}): correct it") from None
    except RecursionError:
        raise UserError(f"--config {path}: nested too deeply for a config: correct it") from None


def merge(default: Any, changes: dict[str, Any], where: str) -> Any:
    """A dataclass with `changes` (nested plain values) over it; unknown keys and wrong types are UserErrors."""
    fields = {field.name: field for field in dataclasses.fields(default)}
    unknown = [key for key in changes if key not in fields]
    if unknown:
        raise UserError(f"{where}: unknown key {shown(unknown[0])}; known: {', '.join(fields)}")
    hints = _hints(type(default))
    values = {}
    for key, value in changes.items():
        current = getattr(default, key)
        if dataclasses.is_dataclass(current) and isinstance(value, dict):
            values[key] = merge(current, value, f"{where}: {key}")
            continue
        section = _section(hints[key])
        if section is not None and isinstance(value, dict):
            # A section that the recipe leaves out: pydantic would pass over keys that it does not know.
            values[key] = merge(section(), value, f"{where}: {key}")
            continue
        if isinstance(value, bool) and not isinstance(current, bool):
            raise UserError(f"{where}: {key}: {value!r} is true or false where {current!r} stands by default")
        if not _can_name(value):
            raise UserError(f"{where}: {key}: {shown(value)} cannot name anything")
        try:
            values[key] = pydantic.TypeAdapter(hints[key]).validate_python(value)
        except pydantic.ValidationError as error:
            raise UserError(f"{where}: {key}: {brief(error.errors()[0]['msg'])} (it is {shown(value)})") from None
    return dataclasses.replace(default, **values)


def _can_name(value: Any) -> bool:
    """Whether the strings in a value can name a file: they hold no NUL, can be encoded, are no longer than paths."""
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    try:
        return all(b"\0" not in (name := os.fsencode(text)) and len(name) < LONGEST for text in texts)
    except UnicodeEncodeError:
        return False


def _section(hint: Any) -> Any:
    """The dataclass in `Section | None`; None for any other hint."""
    return next((kind for kind in get_args(hint) if dataclasses.is_dataclass(kind)), None)


def _hints(kind: type) -> dict[str, Any]:
    from typing import get_type_hints

    return get_type_hints(kind)
