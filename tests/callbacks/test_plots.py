"""Pictures are drawn, and the numbers of each curve stand beside it as strict JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from pipeline.callbacks import plots
from pipeline.callbacks.metrics import MetricsFile
from pipeline.callbacks.plots import Plots, caption, draw_curve, draw_history, draw_training, tokens
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


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch):
    """The axes of the picture that was drawn last, a row each; what is looked at need not be saved as well."""
    figures: list[Any] = []
    real = plots._figure

    def figure(*words: Any, **options: Any) -> Any:
        figures.append(real(*words, **options))
        figures[-1][0].savefig = lambda path, dpi: None
        return figures[-1]

    monkeypatch.setattr(plots, "_figure", figure)
    return lambda: figures[-1][1]


def test_a_long_title_stays_within_the_picture(shown: Any, tmp_path: Path) -> None:
    subtitle = "miras_smollm2, window 256, 512 slots on layers 0 to 29, checkpoint-68"
    for draw in (
        lambda path: draw_curve(curve(on=(1e-6, 2e-6, 3e-6)), path, subtitle),
        lambda path: draw_history([{"mode": "train", "step": 1, "loss": 1e-6}], ["loss"], path, subtitle),
    ):
        draw(tmp_path / "curve.png")
        axis = shown()[0][0]
        axis.figure.canvas.draw()
        drawn, whole = axis.title.get_window_extent(), axis.figure.bbox
        assert whole.x0 < drawn.x0 < drawn.x1 < whole.x1
        assert subtitle in axis.get_title().replace("\n", " ")


def labels(axis: Any) -> list[str]:
    """What the legend names."""
    return [text.get_text() for text in axis.get_legend().get_texts()]


def ticks(axis: Any, name: str = "x") -> list[str]:
    """The ticks that are seen."""
    axis.figure.canvas.draw()
    low, high = getattr(axis, f"get_{name}lim")()
    found = getattr(axis, f"get_{name}ticklabels")()
    return [text.get_text() for text in found if low <= text.get_position()[name == "y"] <= high]


RATIO = Curve(
    "Perplexity by position", "position", "perplexity", (16.0, 32.0, 64.0, 128.0, 16384.0),
    {"on": (9.0, 5.0, 3.0, 2.0, math.nan), "off": (9.0, 5.0, 3.0, 4.0, math.nan),
     "off / on": (1.0, 1.0, 1.0, 2.0, math.nan)},
    log_x=True, upper_edges=True, drawn=("off / on",), drawn_label="perplexity, off / on",
    intervals={"off / on": ((0.9, 0.9, 0.9, 1.8, math.nan), (1.1, 1.1, 1.1, 2.2, math.nan))},
    counts=(64, 64, 128, 1024, 0), documents=(4, 4, 3, 2, 0), levels={"no difference": 1.0},
    edges={"window of 64": 64.0, "reach of 4 layers": 252.0},
)  # fmt: skip


def test_many_series_have_a_legend_below_and_no_bands_that_hide_them(tmp_path: Path, shown) -> None:
    names = [f"mode {number}" for number in range(7)]
    low, high = RATIO.intervals["off / on"]
    intervals = dict.fromkeys(names[:6], (low, high))
    many = dataclasses.replace(RATIO, series=dict.fromkeys(names, RATIO.series["on"]), drawn=(), intervals=intervals)
    draw_curve(many, tmp_path / "curve.png")
    ((above,), _) = shown()
    assert above.get_legend() is None and not above.collections
    (legend,) = above.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*names, "no difference", "window of 64"]
    numbers = json.loads((tmp_path / "curve.json").read_text())
    assert set(numbers["intervals"]) == set(intervals), "the numbers have all"


def test_a_ratio_is_drawn_with_its_interval_and_what_it_is_compared_with(tmp_path: Path, shown) -> None:
    draw_curve(RATIO, tmp_path / "curve.png", "tiny, window 64, after step 3")
    above, _ = (row[0] for row in shown())
    assert above.get_title() == "Perplexity by position\ntiny, window 64, after step 3"
    assert above.get_ylabel() == "perplexity, off / on"
    assert labels(above) == ["off / on", "off / on, 95 % over documents", "no difference", "window of 64"]
    ratio, level, edge = above.lines
    # A bin is level from its lower to its upper edge.
    assert list(ratio.get_xdata())[4:8] == [32, 64, 64, 128] and list(ratio.get_ydata())[4:8] == [1, 1, 2, 2]
    assert set(level.get_ydata()) == {1.0} and set(edge.get_xdata()) == {64.0}


def test_ticks_are_numbers_of_tokens(tmp_path: Path, shown) -> None:
    draw_curve(RATIO, tmp_path / "curve.png")
    assert ticks(shown()[-1][0]) == ["16", "32", "64", "128"], "where something was seen"
    draw_curve(dataclasses.replace(RATIO, series={"on": (1.0,) * 5}, drawn=()), tmp_path / "curve.png")
    assert ticks(shown()[-1][0]) == ["16", "32", "64", "128", "16K"]


def test_what_each_point_was_measured_on_stands_below_it(tmp_path: Path, shown) -> None:
    draw_curve(RATIO, tmp_path / "curve.png")
    counts = shown()[-1][0]
    assert [text.get_text() for text in counts.texts] == ["64\n/ 4", "64\n/ 4", "128\n/ 3", "1.02K\n/ 2"]
    assert [bar.get_height() for bar in counts.patches] == list(RATIO.counts)
    draw_curve(curve(on=(9.0, 5.0, 3.0)), tmp_path / "curve.png")
    assert len(shown()) == 1, "and nothing where it is not known"


def test_the_numbers_of_a_curve_hold_all_that_is_known(tmp_path: Path) -> None:
    draw_curve(RATIO, tmp_path / "curve.png")
    found = strict(tmp_path / "curve.json")
    assert found["series"] == {"on": [9, 5, 3, 2, None], "off": [9, 5, 3, 4, None], "off / on": [1, 1, 1, 2, None]}
    assert found["intervals"]["off / on"]["high"] == [1.1, 1.1, 1.1, 2.2, None]
    assert (found["counts"], found["documents"]) == ([64, 64, 128, 1024, 0], [4, 4, 3, 2, 0])
    assert found["levels"] == {"no difference": 1.0} and found["edges"]["window of 64"] == 64.0


def test_points_are_drawn_as_points(tmp_path: Path, shown) -> None:
    points = dataclasses.replace(RATIO, upper_edges=False, drawn=("on", "off"), levels={}, edges={}, intervals={})
    draw_curve(points, tmp_path / "curve.png")
    axis = shown()[0][0]
    assert labels(axis) == ["on", "off"] and list(axis.lines[0].get_xdata()) == list(RATIO.x)
    assert axis.lines[0].get_marker() == "o"


def test_places_that_are_no_numbers_have_names_and_no_line(tmp_path: Path, shown) -> None:
    named = Curve(
        "Residues", "residue", "share", (0.0, 1.0), {"drawn": (0.2, 0.8), "held out": (0.5, math.nan)},
        intervals={"drawn": ((0.1, 0.7), (0.3, 0.9))}, interval_over="peptides", names=("A", "C"),
    )  # fmt: skip
    draw_curve(named, tmp_path / "curve.png")
    axis = shown()[0][0]
    assert ticks(axis) == ["A", "C"] and {line.get_linestyle() for line in axis.lines} == {"None"}
    assert labels(axis) == ["drawn, 95 % over peptides", "held out"]
    assert [line.tolist() for line in axis.collections[0].get_segments()] == [
        [[0, 0.1], [0, 0.3]],
        [[1, 0.7], [1, 0.9]],
    ]
    assert strict(tmp_path / "curve.json")["names"] == ["A", "C"]


def test_intervals_of_each_series_say_what_they_are_over(tmp_path: Path, shown) -> None:
    over = {"drawn": "peptides", "held out": "clusters"}
    curve = Curve(
        "Residues", "residue", "share", (0.0, 1.0), {"drawn": (0.2, 0.8), "held out": (0.5, 0.5)},
        intervals={"drawn": ((0.1, 0.7), (0.3, 0.9)), "held out": ((0.4, 0.4), (0.6, 0.6))}, interval_over=over,
        names=("A", "C"),
    )  # fmt: skip
    draw_curve(curve, tmp_path / "curve.png")
    assert labels(shown()[0][0]) == ["drawn, 95 % over peptides", "held out, 95 % over clusters"]


@pytest.mark.parametrize(
    ("count", "text"), [(16, "16"), (64, "64"), (1024, "1024"), (8192, "8K"), (65536, "64K"), (10000, "10000")]
)
def test_tokens(count: int, text: str) -> None:
    assert tokens(count) == text


def test_parts_of_a_caption_that_are_empty_leave_nothing() -> None:
    assert caption("tiny", "", "after step 3") == "tiny, after step 3"


TRAINED = [
    {"mode": "train", "step": step, "loss": 5.0, "grad_norm": 8.0 / step, "lr": 1e-3, "tok_s": 9.0}
    for step in range(1, 41)
]


def test_the_gradient_norm_stands_on_a_log_axis_beside_what_it_is_clipped_to(tmp_path: Path, shown) -> None:
    draw_training(TRAINED, tmp_path / "training.png", title="tiny", clip=1.5)
    norm = shown()[0][1]
    assert norm.get_yscale() == "log" and labels(norm) == ["training", "clipped to 1.5"]
    assert set(norm.lines[1].get_ydata()) == {1.5}
    assert ticks(norm, "y") == ["0.2", "0.5", "1", "2", "5"]
    draw_training(TRAINED, tmp_path / "training.png", title="tiny", clip=0.0)
    assert len(shown()[0][1].lines) == 1, "nothing is clipped"


@pytest.mark.parametrize("norm", [None, 0.0])
def test_a_run_whose_gradients_are_unknown_or_nothing_is_drawn(norm: float | None, tmp_path: Path, shown) -> None:
    draw_training([{**TRAINED[0], "grad_norm": norm}], tmp_path / "training.png", title="tiny", clip=1.0)
    assert shown()[0][1].get_yscale() == "linear"


def test_pictures_of_a_run_say_of_what(make_run, monkeypatch: pytest.MonkeyPatch, shown) -> None:
    run = make_run()
    monkeypatch.setattr(type(run.system), "caption", lambda self: "window 64")
    MetricsFile(run).on_evaluation(7, Evaluation({"loss": 2.0}))
    pictures = Plots(run)
    pictures.on_evaluation(7, Evaluation({"loss": 2.0}))
    assert shown()[0][0].figure.get_suptitle() == "miras_tiny, window 64"
    titles = []
    monkeypatch.setattr(plots, "draw_curve", lambda curve, path, subtitle: titles.append(subtitle))
    pictures.on_evaluation(7, Evaluation({"loss": 2.0}, {"curve": RATIO}))
    assert titles == ["miras_tiny, window 64, after step 7"]


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
    file, pictures = MetricsFile(run), Plots(run)
    evaluation = Evaluation({"loss": 2.0}, {"perplexity_by_position": curve(on=(9.0, 5.0, 3.0))})
    file.on_step(record(1))
    file.on_evaluation(1, evaluation)
    pictures.on_evaluation(1, evaluation)
    folder = run.folder / "plots"
    names = {"perplexity_by_position.png", "perplexity_by_position.json", "training.png"}
    assert {path.name for path in folder.iterdir()} == names
    before = (folder / "training.png").read_bytes()
    file.on_step(record(2, loss=9.0))
    pictures.on_end("finished")
    assert (folder / "training.png").read_bytes() != before
    assert is_picture(folder / "training.png") and is_picture(folder / "perplexity_by_position.png")


def test_training_curves_have_an_interval_of_their_own(make_run, record) -> None:
    run = make_run(report__plot_every=4)
    file, pictures = MetricsFile(run), Plots(run)
    training = run.folder / "plots" / "training.png"
    drawn: list[int] = []
    evaluation = Evaluation({"loss": 2.0}, {"perplexity_by_position": curve(on=(9.0, 5.0, 3.0))})
    for step in range(1, 10):
        file.on_step(record(step))
        if step in (3, 8):
            file.on_evaluation(step, evaluation)
            pictures.on_evaluation(step, evaluation)
            assert not training.exists()
        pictures.while_paused(step)
        if training.exists():
            drawn.append(step)
            training.unlink()
    assert drawn == [4, 8]
    assert is_picture(run.folder / "plots" / "perplexity_by_position.png")
    pictures.on_end("finished")
    assert is_picture(training)


def test_without_an_interval_they_are_drawn_at_evaluations_alone(make_run, record) -> None:
    run = make_run()
    MetricsFile(run).on_step(record(1))
    Plots(run).while_paused(1)
    assert not (run.folder / "plots").exists()


def test_a_run_that_ends_before_its_first_row_draws_nothing(make_run) -> None:
    run = make_run()
    Plots(run).on_end("failed")
    assert not (run.folder / "plots" / "training.png").exists()


def test_a_history_shows_what_there_is_over_the_steps(tmp_path: Path, shown) -> None:
    rows = [
        {"mode": "train", "step": 1, "distance": 0.5}, {"mode": "val", "step": 1, "converged": 0.25},
        {"mode": "train", "step": 2, "distance": 0.4, "share": None}, {"mode": "val", "step": 3, "converged": 1.0},
    ]  # fmt: skip
    draw_history(rows, ("converged", "distance", "share", "absent"), tmp_path / "history.png", title="a run")
    found = {line.get_label(): line for line in shown()[0][0].lines}
    lines = {name: (list(line.get_xdata()), list(line.get_ydata()), line.get_marker()) for name, line in found.items()}
    assert lines == {"converged": ([1, 3], [0.25, 1.0], "o"), "distance": ([1, 2], [0.5, 0.4], "None")}


def test_a_systems_histories_are_drawn_with_the_training_curves(make_run, record) -> None:
    run = make_run()
    run.system.histories = {"speeds": ("tok_s",), "never": ("converged",)}
    MetricsFile(run).on_step(record(1))
    Plots(run).on_end("finished")
    # None of what no row has.
    assert {path.name for path in (run.folder / "plots").iterdir()} == {"training.png", "speeds.png"}
    assert is_picture(run.folder / "plots" / "speeds.png")
