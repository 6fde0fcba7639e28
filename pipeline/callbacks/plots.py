"""PNG pictures a person would look at: training curves, and whatever curves an evaluation returns."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.callbacks.base import Callback
from pipeline.callbacks.metrics import read_rows
from pipeline.run import Run
from pipeline.system import Curve, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Plots(Callback):
    """Redraws OUT/plots at every evaluation and at the end; the numbers of each curve stand beside it as JSON."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.folder = run.folder / "plots"

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.folder.mkdir(exist_ok=True)
        for name, curve in evaluation.curves.items():
            draw_curve(curve, self.folder / f"{name}.png", subtitle=f"after step {step}")
        self._training()

    def on_end(self, status: str) -> None:
        if status == "failed":
            # The reason must reach the person first, and the curves up to the last evaluation are there.
            return
        self.folder.mkdir(exist_ok=True)
        self._training()

    def _training(self) -> None:
        path = self.run.folder / "metrics.jsonl"
        if path.exists():
            draw_training(read_rows(path), self.folder / "training.png", title=self.run.config.recipe)


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    # The object interface: no global figure manager, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_curve(curve: Curve, path: Path, subtitle: str = "") -> None:
    """One picture of an evaluation, and its numbers as JSON of the same name."""
    figure, axes = _figure(1, 1)
    axis: Axes = axes[0][0]
    for label, values in curve.series.items():
        points = [(x, y) for x, y in zip(curve.x, values, strict=True) if math.isfinite(y)]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    if curve.log_x:
        axis.set_xscale("log", base=2)
    axis.set(xlabel=curve.x_label, ylabel=curve.y_label, title=f"{curve.title}\n{subtitle}".strip())
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()
    figure.savefig(path, dpi=120)
    clean = {
        label: [value if math.isfinite(value) else None for value in values] for label, values in curve.series.items()
    }
    path.with_suffix(".json").write_text(json.dumps({"x": list(curve.x), "series": clean}, indent=1) + "\n")


def draw_training(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Loss, gradient norm, learning rate and throughput over the steps."""
    train = [row for row in rows if row["mode"] == "train"]
    held_out = [row for row in rows if row["mode"] == "val"]
    figure, axes = _figure(2, 2)
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
            if axis.lines:
                axis.legend()
        axis.set(xlabel="step", ylabel=y_label)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
