"""`eval` finds its checkpoint, and writes what it found so that anything can read it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.evals.command import find_checkpoint_folder, render, run_eval, write
from pipeline.system import Curve, Evaluation
from tests.checkpoint.whole import write_whole

CURVE = Curve(
    "Recall by distance", "tokens back", "share", (20.0, 40.0, 60.0),
    {"memory on": (1.0, math.nan, 0.75), "memory off": (0.5, math.nan, math.nan)},
)  # fmt: skip
EVALUATION = Evaluation({"loss": 2.123456789, "memory_off/loss": 2.5}, {"recall_by_distance": CURVE})


def strict(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_checkpoint_is_itself(tmp_path: Path) -> None:
    assert find_checkpoint_folder(tmp_path) == tmp_path


def test_a_run_is_the_checkpoint_that_its_latest_names(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("checkpoint-20\n")
    assert find_checkpoint_folder(tmp_path) == checkpoint
    assert find_checkpoint_folder(checkpoint) == checkpoint


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: no such checkpoint"):
        find_checkpoint_folder(tmp_path / "absent")


@pytest.mark.parametrize("words", [[], ["--steps", "3"]], ids=str)
def test_a_checkpoint_must_be_given(words: list[str]) -> None:
    with pytest.raises(UserError, match="eval needs a checkpoint"):
        run_eval(words)


def test_a_suite_that_is_not_there_is_named(tmp_path: Path) -> None:
    for words in (["--suite", "short"], ["--steps", "3", "--suite=short"]):
        suites = "long, recall, lifelong, peptides, contexts, downstream"
        with pytest.raises(UserError, match=f"--suite 'short': give one of {suites}, or leave it out"):
            run_eval([str(tmp_path), *words])


def test_an_unfinished_checkpoint_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no complete checkpoint: give the folder of a checkpoint, or a run dir"):
        run_eval([str(tmp_path)])
    (tmp_path / "memory.json").write_text("{}")
    with pytest.raises(UserError, match=r"a memory alone, which --model\.memory\.pretrained attaches to its backbone"):
        run_eval([str(tmp_path), "--suite", "downstream"])


def test_a_flip_in_the_saved_config_is_damage(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("recipe: miras_tiny\nsteps: 30\n")
    write_whole(tmp_path, {"step": 1})
    (tmp_path / "config.yaml").write_text("recipe: miras_tiny\nsteps: 31\n")
    with pytest.raises(UserError, match=r"config\.yaml: content differs from its hash"):
        run_eval([str(tmp_path)])


def test_the_result_is_json_and_a_picture_with_its_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "evals" / "checkpoint-20"
    write(EVALUATION, folder, {"checkpoint": "checkpoint-20", "machine": {"ranks": 2}})
    assert strict(folder / "evaluation.json") == {
        "checkpoint": "checkpoint-20",
        "machine": {"ranks": 2},
        "scalars": {"loss": 2.123456789, "memory_off/loss": 2.5},
    }
    assert (folder / "recall_by_distance.png").read_bytes().startswith(b"\x89PNG")
    assert strict(folder / "recall_by_distance.json")["series"]["memory off"] == [0.5, None, None]


def test_samples_stand_beside_the_result(tmp_path: Path) -> None:
    write(Evaluation({"loss": 2.0}, samples={"text": "drawn", "peptides": ["ACD"]}), tmp_path, {})
    assert (tmp_path / "samples" / "text.txt").read_text() == "drawn\n"
    assert strict(tmp_path / "samples" / "peptides.json") == ["ACD"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_scalar_that_is_not_finite_is_null(tmp_path: Path, value: float) -> None:
    write(Evaluation({"loss": value, "ppl": 3.0}), tmp_path, {})
    assert strict(tmp_path / "evaluation.json") == {"scalars": {"loss": None, "ppl": 3.0}}


def test_a_second_evaluation_replaces_the_first(tmp_path: Path) -> None:
    write(EVALUATION, tmp_path, {})
    write(Evaluation({"loss": 1.0}), tmp_path, {})
    assert strict(tmp_path / "evaluation.json") == {"scalars": {"loss": 1.0}}


def test_the_table_shows_scalars_and_every_point_that_was_seen() -> None:
    lines = render(EVALUATION).splitlines()
    assert lines[0].split() == ["loss", "2.12346"]
    assert lines[1].split() == ["memory_off/loss", "2.5"]
    assert "Recall by distance: share" in lines
    rows = [line.split() for line in lines[lines.index("Recall by distance: share") + 2 :]]
    assert rows == [["20", "1", "0.5"], ["60", "0.75", "nan"]]


def test_the_columns_of_a_table_line_up() -> None:
    lines = render(EVALUATION).splitlines()[-3:]
    assert len({len(line) for line in lines}) == 1
    assert "memory on" in lines[0] and "memory off" in lines[0] and "tokens back" in lines[0]


def test_an_evaluation_without_curves_is_a_list() -> None:
    assert render(Evaluation({"loss": 2.0})).split() == ["loss", "2"]


def test_a_table_stands_under_its_columns_and_in_the_file(tmp_path: Path) -> None:
    rows = [
        {"task": "words", "value": 0.25, "stderr": None, "n": 8, "prompt_hash": "0f"},
        {"task": "a_long_name", "value": math.inf, "stderr": 0.125, "n": 10, "prompt_hash": "a1"},
    ]
    found = Evaluation({"loss": 2.0, "downstream/words/acc": 0.25}, tables={"downstream": rows})
    assert render(found).splitlines() == [
        "loss                     2",
        "",
        "task         value  stderr   n  prompt hash",
        "words         0.25       -   8  0f",
        "a_long_name    inf   0.125  10  a1",
    ]
    write(found, tmp_path, {})
    content = strict(tmp_path / "evaluation.json")
    assert content["downstream"] == [rows[0], {**rows[1], "value": None}]
    assert render(Evaluation({}, tables={"downstream": []})) == ""
