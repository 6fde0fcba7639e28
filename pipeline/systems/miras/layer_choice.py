"""Which layers of a backbone get a memory: their numbers, or a word that fits a backbone of any depth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

from pipeline.errors import UserError

Layers: TypeAlias = tuple[int | str, ...]
"""Layer numbers, counted from 0; or one word: upperN, the last N layers; everyN, every Nth, the last of each N."""

WORD = re.compile(r"(upper|every)([1-9][0-9]*)")
LAYERS, OVERFLOW = "--model.memory.layers", "--model.memory.overflow-layers"


def check_words(layers: Layers, flag: str) -> None:
    """Raises UserError, which begins with `flag`, for what no backbone has: wrong words, or a layer named twice."""
    words = [word for word in layers if isinstance(word, str)]
    wrong = next((word for word in words if WORD.fullmatch(word) is None), None)
    if wrong is not None:
        raise UserError(f"{flag} {wrong!r}: give layer numbers, or upperN for the last N layers, everyN for every Nth")
    if words and len(layers) > 1:
        raise UserError(f"{flag} {shown_layers(layers)}: give {words[0]} alone, or layer numbers")
    if len(set(layers)) < len(layers):
        raise UserError(f"{flag} {shown_layers(layers)}: name each layer once")


def chosen_layers(layers: Layers, count: int, flag: str = LAYERS) -> tuple[int, ...]:
    """The numbers of the layers that are meant, of a backbone that has `count`. Raises UserError where it has fewer."""
    check_words(layers, flag)
    if layers and isinstance(layers[0], str):
        found = WORD.fullmatch(layers[0])
        assert found is not None
        kind, number = found[1], int(found[2])
        if number > count:
            raise UserError(
                f"{flag} {layers[0]}: the backbone has {count} layers: give {kind}{count}, or a lower number"
            )
        return tuple(range(count - number, count) if kind == "upper" else range(number - 1, count, number))
    numbers = tuple(number for number in layers if isinstance(number, int))
    if numbers and not 0 <= min(numbers) <= max(numbers) < count:
        raise UserError(
            f"{flag} {shown_layers(layers)}: the backbone has layers 0 to {count - 1}: give some of these, or"
            " upperN for the last N"
        )
    return numbers


def shown_layers(layers: Sequence[int | str]) -> str:
    """As on a command line."""
    return " ".join(map(str, layers))
