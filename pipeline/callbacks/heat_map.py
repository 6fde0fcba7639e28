"""A picture of shares over two axes, with the numbers as JSON of the same name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pipeline.callbacks.plots import tokens
from pipeline.heat_map import HeatMap


def draw_heat_map(heat_map: HeatMap, path: Path, subtitle: str = "") -> None:
    """Each cell says its share in percent and its interval, where it has one; a cell that is not finite stays empty.
    Series that are the same share a panel. Raises OSError."""
    figure_of(heat_map, subtitle).savefig(path, dpi=120)
    path.with_suffix(".json").write_text(json.dumps(_numbers(heat_map), indent=1) + "\n")


def figure_of(heat_map: HeatMap, subtitle: str = "") -> Any:
    """The picture, as a matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(heat_map.y), len(heat_map.x)
    shared: dict[Any, list[str]] = {}
    for label, values in heat_map.series.items():
        shape = (len(values), *{len(row) for row in values})
        if shape != (rows, columns):
            raise ValueError(f"{label} has the shape {shape}: expected {(rows, columns)}")
        shared.setdefault((values, heat_map.intervals.get(label)), []).append(label)
    size = (1.5 + len(shared) * (1.6 + 0.75 * columns), 2.2 + (0.55 if heat_map.intervals else 0.45) * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shared), squeeze=False, sharey=True)[0]
    for axis, ((values, intervals), labels) in zip(panels, shared.items(), strict=True):
        image = axis.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for row, line in enumerate(values):
            for column, share in enumerate(line):
                if not math.isfinite(share):
                    continue
                interval = intervals and all(map(math.isfinite, intervals[row][column]))
                at = "bottom" if interval else "center"
                axis.text(column, row, f"{100 * share:.0f}", ha="center", va=at, fontsize="small")
                if interval:
                    low, high = intervals[row][column]
                    text = f"{100 * low:.0f}-{100 * high:.0f}"
                    axis.text(column, row, text, ha="center", va="top", fontsize="xx-small")
        axis.set_xticks(range(columns), heat_map.x_names or [tokens(x) for x in heat_map.x])
        axis.set_yticks(range(rows), heat_map.y_names or [f"{y:g}" for y in heat_map.y])
        axis.set_xlabel(heat_map.x_label)
        axis.set_title("\n".join(labels), fontsize="medium")
    panels[0].set_ylabel(heat_map.y_label)
    figure.colorbar(image, ax=list(panels), label=f"share of {heat_map.share_of}")
    chance = "" if heat_map.chance is None else f"chance {100 * heat_map.chance:.0f} %"
    count = f"{heat_map.count} {heat_map.counted} a cell" if heat_map.count else ""
    facts = ", ".join(part for part in (subtitle, count, chance) if part)
    figure.suptitle(f"{heat_map.title}\n{facts}".strip(), fontsize="medium")
    return figure


def _numbers(heat_map: HeatMap) -> dict[str, object]:
    """All that is known of it; what is not finite is None."""

    def clean(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "x": list(heat_map.x_names or heat_map.x),
        "y": list(heat_map.y_names or heat_map.y),
        "series": {name: [[clean(v) for v in row] for row in values] for name, values in heat_map.series.items()},
        "intervals": {
            name: [[[clean(low), clean(high)] for low, high in row] for row in values]
            for name, values in heat_map.intervals.items()
        },
        "count": heat_map.count,
        "chance": heat_map.chance,
    }
