"""Samples of evaluations: a file for each step and name, a text as it is, anything else as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.callbacks.samples import SampleFiles, write_samples
from pipeline.errors import RankError
from pipeline.system import Evaluation


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_every_step_and_name_has_a_file(make_run) -> None:
    run = make_run()
    callback = SampleFiles(run)
    callback.on_evaluation(0, Evaluation({"loss": 3.0}, samples={"text": "a b\nc\n", "peptides": ["ACD", "EFG"]}))
    callback.on_evaluation(20, Evaluation({"loss": 2.0}, samples={"text": "b", "ids": {"drawn": [1, 2]}}))
    found = files(run.folder / "samples")
    assert set(found) == {"text-0.txt", "peptides-0.json", "text-20.txt", "ids-20.json"}
    assert (found["text-0.txt"], found["text-20.txt"]) == ("a b\nc\n", "b\n")
    assert json.loads(found["peptides-0.json"]) == ["ACD", "EFG"]
    assert json.loads(found["ids-20.json"]) == {"drawn": [1, 2]}


def test_a_table_of_an_evaluation_is_a_file_of_its_rows(make_run) -> None:
    run = make_run()
    rows = [{"task": "words", "value": 0.5, "stderr": None}, {"task": "others", "value": math.nan, "stderr": 0.1}]
    SampleFiles(run).on_evaluation(20, Evaluation({"loss": 2.0}, samples={"text": "b"}, tables={"downstream": rows}))
    found = files(run.folder / "samples")
    assert set(found) == {"text-20.txt", "downstream-20.json"}
    assert json.loads(found["downstream-20.json"]) == [rows[0], {**rows[1], "value": None}]


def test_samples_come_without_an_evaluation_and_from_ablations(make_run) -> None:
    run = make_run()
    callback = SampleFiles(run)
    callback.on_samples(3, {"text": "a"})
    callback.on_ablations(4, {"one part": Evaluation({}, samples={"text": "b"}), "other": Evaluation({"loss": 1.0})})
    assert files(run.folder / "samples") == {"text-3.txt": "a\n", "without_one_part/text-4.txt": "b\n"}


def test_a_step_that_runs_again_replaces_its_files(make_run) -> None:
    run = make_run()
    for text in ("first", "second"):
        SampleFiles(run).on_evaluation(5, Evaluation({}, samples={"text": text}))
    assert files(run.folder / "samples") == {"text-5.txt": "second\n"}


def test_an_evaluation_without_samples_leaves_no_folder(make_run) -> None:
    run = make_run()
    SampleFiles(run).on_evaluation(5, Evaluation({"loss": 1.0}))
    assert list(run.folder.iterdir()) == []


def test_a_name_with_a_slash_is_a_folder(tmp_path: Path) -> None:
    write_samples({"memory_off/text": "x"}, tmp_path)
    assert files(tmp_path) == {"memory_off/text.txt": "x\n"}


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    write_samples({"scores": [{"loss": math.nan}, (1.5, -math.inf)]}, tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text()) == [{"loss": None}, [1.5, None]]


@given(text=st.text(st.characters(codec=None)))
def test_any_text_that_a_model_draws_can_be_written(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("samples")
    write_samples({"text": text, "list": [text]}, folder)
    assert (folder / "text.txt").read_bytes().endswith(b"\n")
    assert len(json.loads((folder / "list.json").read_text())) == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("a file")
    with pytest.raises(RankError, match=r"samples/text\.txt: not written"):
        write_samples({"text": "x"}, tmp_path / "samples")
