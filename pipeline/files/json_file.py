"""Strict reading of JSON that a person may have edited, or that a crash may have cut off."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from pipeline.errors import UserError, shown

MAX_DEPTH = 100
"""Levels of nesting. Nothing here needs more than ten; readers of the values are recursive."""


LONGEST_NAME, LONGEST_INSIDE = 255, 1000
"""Bytes of a file's name, which file systems take, and of its place in a folder, which leave room for the folder's."""


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text in UTF-8.

    Raises ValueError, whose message is one line, for what is not JSON, for a key that stands twice in one object (the
    json module would drop the first), for NaN and Infinity, and beyond MAX_DEPTH levels.
    """
    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def read_json(path: Path, fix: str) -> Any:
    """The value in a JSON file. Raises UserError, which names the file and ends with `fix`."""
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {fix}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}): {fix}") from None


def is_inside(name: object) -> bool:
    """Whether a name that a file lists can be that of a file in the same folder, or below it."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name or len(name.encode()) > LONGEST_INSIDE:
        return False
    parts = PurePosixPath(name).parts
    return bool(parts) and not {"/", "//", ".."} & set(parts) and all(len(p.encode()) <= LONGEST_NAME for p in parts)


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{shown(twice)} is given twice: keep one")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
