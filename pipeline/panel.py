"""Pictures over the steps of a run: what a system wants drawn of the rows of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Panel:
    """One part of a picture: lines over the steps, or a grid of the last values."""

    title: str
    y_label: str = ""
    lines: Mapping[str, str] = field(default_factory=dict)
    """From what a line is called to the key of its numbers in the rows."""
    log: bool = False
    """Whether y is on a log scale."""
    grid: Sequence[Sequence[str]] = ()
    """Keys by row and column, in place of lines: the value of each in the last row that has it."""
    x_label: str = "step"
    """Of a grid, what its columns are."""


Panels = Mapping[str, Sequence[Panel]]
"""By the name of the picture that they are parts of."""
