"""Pictures are drawn, and the numbers of each curve stand beside it as strict JSON."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from pipeline.callbacks.metrics import MetricsFile
from pipeline.callbacks.plots import Plots, draw_curve, draw_training
from pipeline.system import Curve, Evaluation


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def curve(**series: tuple[float, ...]) -> Curve:
    return Curve("Perplexity by position", "position", "perplexity", (16.0, 32.0, 64.0), series, log_x=True)


def is_picture(path: Path) -> bool:
    content = path.read_bytes()
    return content.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in content[-12:] and len(content) > 5000


def strict(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_curve_is_a_picture_and_its_numbers(tmp_path: Path) -> None:
    draw_curve(
        curve(on=(9.0, math.nan, 3.0), off=(9.0, math.inf, 8.0)), tmp_path / "curve.png", subtitle="after step 3"
    )
    assert is_picture(tmp_path / "curve.png")
    assert strict(tmp_path / "curve.json") == {
        "x": [16.0, 32.0, 64.0],
        "series": {"on": [9.0, None, 3.0], "off": [9.0, None, 8.0]},
    }


def test_a_curve_of_nothing_but_gaps_is_drawn_without_complaint(tmp_path: Path) -> None:
    draw_curve(curve(on=(math.nan, math.nan, math.nan)), tmp_path / "curve.png")
    assert is_picture(tmp_path / "curve.png")
    assert strict(tmp_path / "curve.json")["series"]["on"] == [None, None, None]


def test_a_curve_whose_lengths_differ_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        draw_curve(curve(on=(1.0, 2.0)), tmp_path / "curve.png")


def test_the_picture_depends_on_the_numbers(tmp_path: Path) -> None:
    for name, last in (("a", 3.0), ("b", 3.0), ("c", 8.0)):
        draw_curve(curve(on=(9.0, 5.0, last)), tmp_path / f"{name}.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"mode": "val", "step": 0, "loss": 5.0, "memory_off/loss": 5.5}],
        [{"mode": "val", "step": 0, "loss": None}],
        [{"mode": "train", "step": 1, "loss": None, "grad_norm": None, "lr": 1e-3, "tok_s": 100.0}],
        [{"mode": "train", "step": step, "loss": 5.0, "grad_norm": 1.0, "lr": 1e-3, "tok_s": 9.0} for step in (1, 2)],
    ],
    ids=["nothing yet", "evaluation alone", "a loss that was not finite", "a skipped update", "training"],
)  # fmt: skip
def test_training_is_drawn_whatever_has_happened_so_far(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    draw_training(rows, tmp_path / "training.png", title="miras_tiny")
    assert is_picture(tmp_path / "training.png")


def test_a_run_has_its_pictures_after_an_evaluation_and_at_the_end(make_run, record) -> None:
    run = make_run()
    file, plots = MetricsFile(run), Plots(run)
    evaluation = Evaluation({"loss": 2.0}, {"perplexity_by_position": curve(on=(9.0, 5.0, 3.0))})
    file.on_step(record(1))
    file.on_evaluation(1, evaluation)
    plots.on_evaluation(1, evaluation)
    folder = run.folder / "plots"
    names = {"perplexity_by_position.png", "perplexity_by_position.json", "training.png"}
    assert {path.name for path in folder.iterdir()} == names
    before = (folder / "training.png").read_bytes()
    file.on_step(record(2, loss=9.0))
    plots.on_end("finished")
    assert (folder / "training.png").read_bytes() != before
    assert is_picture(folder / "training.png") and is_picture(folder / "perplexity_by_position.png")


def test_a_run_that_ends_before_its_first_row_draws_nothing(make_run) -> None:
    run = make_run()
    Plots(run).on_end("failed")
    assert not (run.folder / "plots" / "training.png").exists()
