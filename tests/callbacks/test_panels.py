"""Pictures of panels: a file per picture and phase, one of all, nothing where there are no numbers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from pipeline.callbacks import panels
from pipeline.callbacks.panels import COMBINED, draw_panels
from pipeline.callbacks.plots import Plots
from pipeline.panel import Panel


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


ROWS = [
    {"mode": "train", "step": 1, "phase": "A", "loss": 3.0, "a0": 0.1, "a1": None},
    {"mode": "train", "step": 2, "phase": "B", "loss": 2.0, "a0": 0.2, "a1": 0.0},
    {"mode": "val", "step": 2, "phase": "B", "loss": 2.5},
    {"mode": "ablate", "step": 2, "phase": "B", "without": "EM", "loss": 4.0},
]
PANELS = {
    "training": [Panel("Loss", "nats", {"training": "loss"}, log=True), Panel("Nothing", lines={"x": "not there"})],
    "pm": [Panel("Strengths", grid=[["a0", "a1"], ["a2", "a3"]], x_label="column")],
    "em": [Panel("Nothing", lines={"x": "not there"})],
}


def pictures(folder: Path) -> set[str]:
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 3000
    return {path.name for path in folder.glob("*.png")}


def test_each_picture_is_a_file_of_its_phase(tmp_path: Path) -> None:
    draw_panels(ROWS, PANELS, tmp_path, "B", "tiny")
    expected = {"through_phase_B_plot_training.png", "through_phase_B_plot_pm.png", COMBINED}
    assert pictures(tmp_path) == expected
    before = (tmp_path / COMBINED).read_bytes()
    draw_panels([*ROWS, {"mode": "train", "step": 3, "phase": "C", "loss": 1.0}], PANELS, tmp_path, "C", "tiny")
    assert pictures(tmp_path) == expected | {name.replace("_B_", "_C_") for name in expected}
    assert (tmp_path / COMBINED).read_bytes() != before


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    draw_panels([], PANELS, tmp_path, "A")
    assert pictures(tmp_path) == set()


def test_more_lines_than_a_legend_names(tmp_path: Path) -> None:
    rows = [{"mode": "train", "step": step, "phase": "A", **{f"x{i}": i * step for i in range(24)}} for step in (1, 2)]
    draw_panels(rows, {"gates": [Panel("Many", lines={f"x{i}": f"x{i}" for i in range(24)})]}, tmp_path, "A")
    assert "through_phase_A_plot_gates.png" in pictures(tmp_path)


def test_a_run_draws_what_its_system_asks_for(make_run) -> None:
    run = make_run(report__plot_every=2)
    run.system.panels = PANELS
    run.progress.phase = "B"
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    plots = Plots(run)
    plots.while_paused(1)
    assert pictures(run.folder) == set()
    plots.while_paused(2)
    assert pictures(run.folder) == {"through_phase_B_plot_training.png", "through_phase_B_plot_pm.png", COMBINED}


def test_what_is_held_out_is_a_line_of_its_own_and_an_ablation_is_none() -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    panels._draw_lines(axis, ROWS, PANELS["training"][0])
    found = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axis.lines}
    assert found.pop("training") == [[1, 3], [2, 2]] and found.pop("training, held out") == [[2, 2.5]]
    # Where a phase ends.
    assert [points[0][0] for points in found.values()] == [1.5]
