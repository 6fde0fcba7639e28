"""Pictures of several panels over the steps of a run, as a system asks for them, and one of all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.callbacks.metrics import SUMMARY
from pipeline.panel import Panel, Panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
LEGEND = 12
"""Lines that a legend names; more have no legend, and a colour by their place."""
COMBINED = "plot_combined.png"


def draw_panels(rows: Sequence[Mapping[str, Any]], panels: Panels, folder: Path, phase: str, title: str = "") -> None:
    """Writes through_phase_PHASE_plot_NAME.png of each picture, and `COMBINED` of all, over all `rows` so far. Panels
    without a number are left out, and pictures without a panel."""
    shown = {name: [panel for panel in parts if _has_numbers(rows, panel)] for name, parts in panels.items()}
    for name, parts in shown.items():
        if parts:
            _draw(rows, parts, folder / f"through_phase_{phase}_plot_{name}.png", f"{name}: {title}".rstrip(": "))
    every = [panel for parts in shown.values() for panel in parts]
    if every:
        _draw(rows, every, folder / COMBINED, title)


def _has_numbers(rows: Sequence[Mapping[str, Any]], panel: Panel) -> bool:
    keys = {*panel.lines.values(), *(key for line in panel.grid for key in line)}
    return any(row.get(key) is not None for row in rows for key in keys)


def _draw(rows: Sequence[Mapping[str, Any]], panels: Sequence[Panel], path: Path, title: str) -> None:
    # The object interface: no global figure manager, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 0.5 + 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        if panel.grid:
            _draw_grid(figure, axis, rows, panel)
        else:
            _draw_lines(axis, rows, panel)
        axis.set_title(panel.title, fontsize="medium")
        axis.set_xlabel(panel.x_label)
        axis.set_ylabel(panel.y_label)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(title)
    figure.savefig(path, dpi=90)


def _draw_lines(axis: Axes, rows: Sequence[Mapping[str, Any]], panel: Panel) -> None:
    from matplotlib import colormaps

    many = len(panel.lines) > LEGEND
    positive = False
    for place, (label, key) in enumerate(panel.lines.items()):
        options: dict[str, Any] = {"color": colormaps["viridis"](place / len(panel.lines))} if many else {}
        for mode, marker, name in (("train", None, label), (SUMMARY, "o", label), ("val", "o", f"{label}, held out")):
            points = [(row["step"], row[key]) for row in rows if row["mode"] == mode and row.get(key) is not None]
            if points:
                positive = positive or any(value > 0 for _, value in points)
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1, marker=marker, markersize=3, **options)
    if panel.log and positive:
        axis.set_yscale("log")
    for step in _switches(rows):
        axis.axvline(step, color="gray", linestyle=":", linewidth=1)
    axis.grid(alpha=0.3)
    if not many:
        axis.legend(fontsize="x-small")


def _switches(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Where one phase ends and the next begins."""
    train = [(row["step"], row.get("phase")) for row in rows if row["mode"] == "train"]
    return [(before[0] + after[0]) / 2 for before, after in pairwise(train) if before[1] != after[1]]


def _draw_grid(figure: Any, axis: Axes, rows: Sequence[Mapping[str, Any]], panel: Panel) -> None:
    last: dict[str, float] = {}
    for row in rows:
        last.update({key: value for key, value in row.items() if isinstance(value, (int, float))})
    values = [[last.get(key, math.nan) for key in line] for line in panel.grid]
    image = axis.imshow(values, aspect="auto", cmap="viridis")
    axis.set_xticks(range(len(values[0])))
    axis.set_yticks(range(len(values)))
    figure.colorbar(image, ax=axis)
