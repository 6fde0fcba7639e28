"""A heat map is a picture with its numbers beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipeline.callbacks.heat_map import draw_heat_map, figure_of
from pipeline.heat_map import HeatMap


def heat_map(**changes) -> HeatMap:
    values = {"memory on": ((1.0, 0.5), (0.25, math.nan)), "memory off": ((0.25, 0.2), (0.3, 0.1))}
    fields = {"x": (1024.0, 16_384.0), "y": (0.0, 1.0), "series": values, "count": 96, "chance": 0.25}
    return HeatMap("Needle", "tokens", "depth", **{**fields, **changes})


def test_the_picture_has_its_numbers_beside_it(tmp_path: Path) -> None:
    intervals = {"memory on": (((0.9, 1.0), (0.4, 0.6)), ((0.2, 0.3), (math.nan, math.nan)))}
    draw_heat_map(heat_map(intervals=intervals), tmp_path / "needle.png", "a run")
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "needle.json").read_text(), parse_constant=pytest.fail)
    assert numbers["series"]["memory on"] == [[1.0, 0.5], [0.25, None]] and numbers["x"] == [1024, 16_384]
    assert numbers["intervals"]["memory on"][1] == [[0.2, 0.3], [None, None]]
    assert numbers["count"] == 96 and numbers["chance"] == 0.25


def test_cells_show_their_intervals() -> None:
    intervals = {"memory on": (((0.9, 1.0), (0.4, 0.6)), ((0.2, 0.3), (math.nan, math.nan)))}
    on, off = figure_of(heat_map(intervals=intervals)).axes[:2]
    assert [text.get_text() for text in on.texts] == ["100", "90-100", "50", "40-60", "25", "20-30"]
    assert [text.get_text() for text in off.texts] == ["25", "20", "30", "10"]


def test_series_that_are_the_same_share_a_panel() -> None:
    off = ((0.25, 0.2), (0.3, 0.1))
    series = {"memory on": ((1.0, 0.5), (0.25, 0.3)), "memory off": off, "memory emptied": off}
    titles = [axis.get_title() for axis in figure_of(heat_map(series=series)).axes]
    assert titles[:2] == ["memory on", "memory off\nmemory emptied"] and len(titles) == 3, "the third is the scale"


def test_places_may_have_names(tmp_path: Path) -> None:
    names = {"x_names": ("T1", "T2"), "y_names": ("T1", "T3"), "share_of": "peptides"}
    draw_heat_map(heat_map(**names), tmp_path / "targets.png")
    numbers = json.loads((tmp_path / "targets.json").read_text())
    assert (numbers["x"], numbers["y"]) == (["T1", "T2"], ["T1", "T3"])


def test_values_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="memory on has the shape"):
        draw_heat_map(heat_map(series={"memory on": ((1.0, 0.5, 0.1), (0.1, 0.2, 0.3))}), tmp_path / "needle.png")
