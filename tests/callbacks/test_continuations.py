"""Texts that a model went on with: as text, and as a picture where a run draws any."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from pipeline.callbacks.continuations import draw_continuations
from pipeline.callbacks.samples import SampleFiles
from pipeline.evaluation_result import Continuation, Continuations

SAMPLE = Continuations(
    (Continuation("Once upon", " a time\n", " a hill $x$"), Continuation("\x1b[0m 漢字", "", "long " * 60))
)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 3000


def test_any_text_is_drawn(tmp_path: Path) -> None:
    draw_continuations(SAMPLE, tmp_path / "x.png", "after $step 3")
    assert is_picture(tmp_path / "x.png")
    one = Continuations((Continuation("Once upon", " a time", " a hill"),))
    draw_continuations(one, tmp_path / "y.png")
    other = Continuations((Continuation("Once upon", " a hill", " a time"),))
    draw_continuations(other, tmp_path / "z.png")
    assert (tmp_path / "y.png").read_bytes() != (tmp_path / "z.png").read_bytes()


def test_a_run_writes_text_and_picture(make_run) -> None:
    run = make_run()
    SampleFiles(run).on_samples(200, {"text_samples": SAMPLE, "other": "x"})
    assert is_picture(run.folder / "text_samples_step200.png")
    written = (run.folder / "samples" / "text_samples-200.txt").read_text()
    assert written.startswith("[1] prompt\nOnce upon\n\n[1] model\n a time\n\n\n[1] truth\n a hill $x$\n\n[2] prompt\n")
    assert {path.name for path in run.folder.iterdir()} == {"samples", "text_samples_step200.png"}


def test_without_plots_there_is_no_picture(make_run) -> None:
    run = make_run(report__plots=False)
    SampleFiles(run).on_samples(200, {"text_samples": SAMPLE})
    assert {path.name for path in run.folder.iterdir()} == {"samples"}
