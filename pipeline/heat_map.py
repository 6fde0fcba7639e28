"""A picture of shares over two axes, as an evaluation returns it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class HeatMap:
    """Shares over two axes."""

    title: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    series: dict[str, tuple[tuple[float, ...], ...]]
    """values[y][x], 0 to 1."""
    intervals: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = field(default_factory=dict)
    """(lower, upper) end by series, as the values: 95 % intervals."""
    count: int = 0
    """Questions behind each cell."""
    chance: float | None = None
    """What a guess has."""
    x_names: tuple[str, ...] = ()
    """What each x is called, where it is no number."""
    y_names: tuple[str, ...] = ()
    share_of: str = "right answers"
    counted: str = "questions"
    """What `count` counts."""
