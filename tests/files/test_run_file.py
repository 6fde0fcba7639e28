"""What an earlier start of a run tells the next one, and what a damaged file does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.files.run_file import RunFile, read_run_file
from pipeline.run_folder import open_folder, write_run_file
from tests.checkpoint.small_runs import a_run


def test_a_run_says_how_it_ended_and_what_it_evaluated(tmp_path: Path) -> None:
    run = a_run(tmp_path, step=8)
    run.done = {"evaluated": (0, 8), "sampled": (8,)}
    write_run_file(run, "stopped")
    assert read_run_file(tmp_path) == RunFile("stopped", {"evaluated": (0, 8), "sampled": (8,)}, ("train",))


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "3", '{"status": 1, "evaluated": 8}', '{"evaluated": [true]}', "\xff"]
)
def test_a_file_that_says_nothing(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content, encoding="latin-1")
    assert read_run_file(tmp_path) == RunFile()


@pytest.mark.parametrize(("step", "known"), [(8, (0, 4, 8)), (9, (0, 4, 8)), (7, (0, 4)), (4, (0, 4)), (0, ())])
def test_a_resume_knows_of_the_evaluations_up_to_its_step(tmp_path: Path, step: int, known: tuple[int, ...]) -> None:
    """Those after it are made again, and all of them by a start from scratch."""
    before = a_run(tmp_path, step=8)
    before.done = {"evaluated": (0, 4, 8), "ablated": (8,)}
    write_run_file(before, "stopped")
    run = a_run(tmp_path, step=step)
    with run.lock:
        open_folder(run)
    assert run.done == ({"evaluated": known, "ablated": (8,) if step >= 8 else ()} if step else {})
    assert json.loads((tmp_path / "run.json").read_text())["evaluated"] == list(known)
