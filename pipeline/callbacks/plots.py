"""PNG pictures a person would look at: training curves, and whatever curves an evaluation returns."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.callbacks.base import Callback
from pipeline.callbacks.metrics import read_rows
from pipeline.callbacks.panels import draw_panels
from pipeline.callbacks.samples import without
from pipeline.run import Run
from pipeline.system import Curve, Evaluation
from pipeline.units import human_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes


DASHES = ("--", ":", "-.")
"""Styles of lines that something is compared with, in turn."""
MOST_SHADED = 3
"""Series whose intervals are shaded: more hide each other and the lines. The numbers have all."""
WIDEST_OF_TWO = 40
"""Characters of an entry of a legend that has two columns."""
MOST_INSIDE = 6
"""Entries of a legend within the axes: more would hide the curves, and stand below."""
WIDEST_TITLE = 58
"""Characters of a line of a title above a single column."""


class Plots(Callback):
    """Redraws OUT/plots at every evaluation and at the end; the numbers of each curve stand beside it as JSON.

    With `--report.plot-every` the training curves have that interval in place of the evaluations'.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.every = run, run.config.report.plot_every
        self.folder = run.folder / "plots"
        self.subtitle = caption(run.config.recipe, run.system.caption())

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.folder.mkdir(exist_ok=True)
        for name, curve in evaluation.curves.items():
            draw_curve(curve, self.folder / f"{name}.png", caption(self.subtitle, f"after step {step}"))
        if not self.every:
            self._training()

    def on_ablations(self, step: int, ablations: Mapping[str, Evaluation]) -> None:
        for part, evaluation in ablations.items():
            folder, text = self.folder / without(part), f"without {part}, after step {step}"
            for name, curve in evaluation.curves.items():
                folder.mkdir(parents=True, exist_ok=True)
                draw_curve(curve, folder / f"{name}.png", caption(self.subtitle, text))

    def while_paused(self, step: int) -> None:
        if self.every and step % self.every == 0:
            self._training()

    def on_end(self, status: str) -> None:
        if status == "failed":
            # The reason must reach the person first, and the curves up to the last evaluation are there.
            return
        self._training()

    def _training(self) -> None:
        path = self.run.folder / "metrics.jsonl"
        self.folder.mkdir(exist_ok=True)
        if path.exists():
            clip, rows = self.run.config.clip, read_rows(path)
            draw_training(rows, self.folder / "training.png", title=self.subtitle, clip=clip)
            for name, shown in self.run.system.histories.items():
                draw_history(rows, shown, self.folder / f"{name}.png", title=self.subtitle)
            draw_panels(rows, self.run.system.panels, self.run.folder, self.run.progress.phase, self.subtitle)


def caption(*parts: str) -> str:
    """What a picture is of: the recipe, the system's caption, a step or checkpoint; empty parts are left out."""
    return ", ".join(part for part in parts if part)


def _lines(*titles: str) -> str:
    return "\n".join(textwrap.fill(title, WIDEST_TITLE) for title in titles if title)


def _figure(columns: int, heights: Sequence[float], **options: Any) -> tuple[Any, Any]:
    # The object interface: no global figure manager, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 3.6 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights, **options)


def draw_curve(curve: Curve, path: Path, subtitle: str = "") -> None:
    """One picture of an evaluation, and its numbers as JSON of the same name."""
    heights = (1.0, 0.25) if curve.counts else (1.0,)
    figure, axes = _figure(1, heights, sharex=True)
    axis: Axes = axes[0][0]
    drawn = curve.drawn or tuple(curve.series)
    shaded = sum(label in curve.intervals for label in drawn) <= MOST_SHADED
    for label in drawn:
        _draw_series(axis, curve, label, shaded or bool(curve.names))
    for (label, level), dash in zip(curve.levels.items(), cycle(DASHES), strict=False):
        axis.axhline(level, color="black", linestyle=dash, linewidth=1, label=label)
    for (label, edge), dash in zip(curve.edges.items(), cycle(DASHES), strict=False):
        if _edges(curve)[0] <= edge <= _last(curve):
            axis.axvline(edge, color="tab:red", linestyle=dash, linewidth=1, label=label)
    axis.set(ylabel=curve.drawn_label or curve.y_label, title=_lines(curve.title, subtitle))
    axis.title.set_fontsize("medium")
    axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > MOST_INSIDE:
        columns = 1 if max(map(len, labels)) > WIDEST_OF_TWO else 2
        figure.set_figheight(figure.get_figheight() + 0.18 * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="x-small")
    elif labels:
        axis.legend(fontsize="x-small")
    if curve.counts:
        _draw_counts(axes[1][0], curve)
    _scale_x(axes[-1][0], curve)
    axes[-1][0].set_xlabel(curve.x_label)
    figure.savefig(path, dpi=120)
    path.with_suffix(".json").write_text(json.dumps(_numbers(curve), indent=1) + "\n")


def _edges(curve: Curve) -> list[float]:
    """Left of the first point, then every x: the edges of bins where the points are bins."""
    x = curve.x
    step = x[1] - x[0] if len(x) > 1 else x[0]
    return [x[0] / 2 if curve.log_x else x[0] - step, *x]


def _last(curve: Curve) -> float:
    """The last x at which anything was seen."""
    seen = [x for values in curve.series.values() for x, y in zip(curve.x, values, strict=True) if math.isfinite(y)]
    return max(seen, default=curve.x[-1])


def _draw_series(axis: Axes, curve: Curve, label: str, shaded: bool) -> None:
    """A line, with its interval where that is shaded: level over each bin, else through points. What is not finite
    leaves a gap."""
    edges = _edges(curve)
    sides = [edge for pair in pairwise(edges) for edge in pair]
    x = sides if curve.upper_edges else curve.x

    def points(values: Sequence[float]) -> list[float]:
        if len(values) != len(curve.x):
            raise ValueError(f"{label} has {len(values)} values for {len(curve.x)} places")
        clean = [value if math.isfinite(value) else math.nan for value in values]
        return [value for value in clean for _ in range(1 + curve.upper_edges)]

    values = points(curve.series[label])
    if all(map(math.isnan, values)):
        return
    marker, style = None if curve.upper_edges else "o", "none" if curve.names else "-"
    (line,) = axis.plot(x, values, label=label, marker=marker, markersize=3, linestyle=style)
    if shaded and label in curve.intervals:
        low, high = map(points, curve.intervals[label])
        over = curve.interval_over if isinstance(curve.interval_over, str) else curve.interval_over[label]
        name = f"{label}, 95 % over {over}"
        if curve.names:
            line.set_label(name)
            axis.vlines(x, low, high, alpha=0.4, color=line.get_color())
        else:
            axis.fill_between(x, low, high, alpha=0.2, linewidth=0, color=line.get_color(), label=name)


def _draw_counts(axis: Axes, curve: Curve) -> None:
    """How many labels each point was measured on, as bars, with the number of documents that they are of."""
    edges = _edges(curve)
    for index, count in enumerate(curve.counts):
        left, right = edges[index], edges[index + 1]
        if not curve.upper_edges:
            # About the point, as wide as neighbours allow.
            left, right = (right / 1.2, right * 1.2) if curve.log_x else (right - 0.4, right + 0.4)
        axis.bar(left, count, width=right - left, align="edge", color="tab:gray", edgecolor="white")
        if count:
            middle = math.sqrt(left * right) if curve.log_x else (left + right) / 2
            text = (
                f"{human_count(count)}\n/ {human_count(curve.documents[index])}"
                if curve.documents
                else human_count(count)
            )
            axis.annotate(text, (middle, count), ha="center", va="bottom", fontsize="xx-small")
    axis.set_ylim(0, 1.6 * max(1, *curve.counts))
    axis.set_yticks([])
    axis.set_ylabel("labels /\ndocuments" if curve.documents else "labels", fontsize="small")


def _scale_x(axis: Axes, curve: Curve) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if curve.log_x:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(curve.x))
        axis.xaxis.set_minor_locator(NullLocator())
    if curve.upper_edges:
        axis.set_xlim(_edges(curve)[0], _last(curve))
    if curve.names:
        crowded = max(map(len, curve.names)) * len(curve.names) > 60
        axis.set_xticks(curve.x, curve.names, rotation=20 if crowded else 0, ha="right" if crowded else "center")
    else:
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(value)))


def tokens(count: float) -> str:
    """A number of tokens as a tick says it: 64, 1024, 16K (of 1024)."""
    return f"{count / 1024:.0f}K" if count >= 8192 and count % 1024 == 0 else f"{count:g}"


def _numbers(curve: Curve) -> dict[str, Any]:
    """All that is known of a curve, for a file; what is not finite is None."""

    def clean(values: Sequence[float]) -> list[float | None]:
        return [value if math.isfinite(value) else None for value in values]

    numbers: dict[str, Any] = {"x": list(curve.x), "series": {name: clean(v) for name, v in curve.series.items()}}
    ends = {name: {"low": clean(low), "high": clean(high)} for name, (low, high) in curve.intervals.items()}
    more = {
        "intervals": ends, "counts": list(curve.counts), "documents": list(curve.documents), "levels": curve.levels,
        "edges": curve.edges, "names": list(curve.names),
    }  # fmt: skip
    return numbers | {name: value for name, value in more.items() if value}


def draw_training(rows: Sequence[dict[str, Any]], path: Path, title: str, clip: float = 0.0) -> None:
    """Loss, gradient norm (beside what it is clipped to; 0: nothing), learning rate and throughput over the steps."""
    train = [row for row in rows if row["mode"] == "train"]
    held_out = [row for row in rows if row["mode"] == "val"]
    figure, axes = _figure(2, (1.0, 1.0))
    panels = [("loss", "loss (nats per label)"), ("grad_norm", "gradient norm"), ("lr", "learning rate"),
              ("tok_s", "tokens per second")]  # fmt: skip
    for axis, (key, y_label) in zip(axes.flat, panels, strict=True):
        points = [(row["step"], row[key]) for row in train if row.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), linewidth=1, label="training")
        if key == "loss":
            names = sorted({name for row in held_out for name in row if name == "loss" or name.endswith("/loss")})
            for name in names:
                points = [(row["step"], row[name]) for row in held_out if row.get(name) is not None]
                if points:
                    variant = name.removesuffix("loss").rstrip("/").replace("_", " ")
                    label = f"held out, {variant}" if variant else "held out"
                    axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        if key == "grad_norm" and any(value > 0 for _, value in points):
            axis.set_yscale("log")
            _plain_ticks(axis)
            if clip:
                axis.axhline(clip, color="black", linestyle="--", linewidth=1, label=f"clipped to {clip:g}")
        if len(axis.lines) > 1:
            axis.legend(fontsize="small")
        axis.set(xlabel="step", ylabel=y_label)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def draw_history(rows: Sequence[dict[str, Any]], names: Sequence[str], path: Path, title: str) -> None:
    """Numbers of the rows of a run over the steps, each that there is: a line, of held-out ones with its points. No
    picture where there is none of them."""
    series = {
        name: points
        for name in names
        if (points := [(row["step"], row[name]) for row in rows if row.get(name) is not None])
    }
    if not series:
        return
    figure, axes = _figure(1, (1.0,))
    axis: Axes = axes[0][0]
    held_out = {name for row in rows if row["mode"] != "train" for name in row}
    for name, points in series.items():
        marker = "o" if name in held_out else None
        axis.plot(*zip(*points, strict=True), label=name.replace("_", " "), linewidth=1, marker=marker, markersize=3)
    axis.legend(fontsize="x-small")
    axis.set(xlabel="step", title=_lines(title))
    axis.title.set_fontsize("medium")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _plain_ticks(axis: Axes) -> None:
    """0.1, 0.2, 0.5, 1 on a log axis instead of powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
