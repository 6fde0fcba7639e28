"""The resolved config as YAML: archived with every run and checkpoint, and run again with `--config`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pydantic
import yaml

from pipeline.config import RunConfig
from pipeline.errors import UserError


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The config as plain YAML values."""

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
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise UserError(f"{node.start_mark.name}: {sorted(twice)[0]!r} is given twice: keep one")
        return super().construct_mapping(node, deep)


def load_config(path: Path, recipes: dict[str, Any]) -> RunConfig:
    """The config in a YAML file, over the defaults of the recipe that it names. Raises UserError.

    Whether foreign code may run is for the flags of a command alone to say: a file can come from anywhere.
    """
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        with path.open() as handle:
            content = yaml.load(handle, Loader=_UniqueKeys)
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not a text file") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not YAML ({str(error).splitlines()[0]})") from None
    name = content.get("recipe") if isinstance(content, dict) else None
    if not isinstance(name, str) or name not in recipes:
        raise UserError(f"--config {path}: `recipe` must name one of {', '.join(sorted(recipes))}")
    config = merge(recipes[name](), content, str(path))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, trust_remote_code=False))


def merge(default: Any, changes: dict[str, Any], where: str) -> Any:
    """A dataclass with `changes` (nested plain values) over it; unknown keys and wrong types are UserErrors."""
    fields = {field.name: field for field in dataclasses.fields(default)}
    unknown = [key for key in changes if key not in fields]
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(fields)}")
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
        try:
            values[key] = pydantic.TypeAdapter(hints[key]).validate_python(value)
        except pydantic.ValidationError as error:
            raise UserError(f"{where}: {key}: {error.errors()[0]['msg']} (it is {value!r})") from None
    return dataclasses.replace(default, **values)


def _section(hint: Any) -> Any:
    """The dataclass in `Section | None`; None for any other hint."""
    return next((kind for kind in get_args(hint) if dataclasses.is_dataclass(kind)), None)


def _hints(kind: type) -> dict[str, Any]:
    from typing import get_type_hints

    return get_type_hints(kind)
