"""The fixed point of contexts on two data ranks: gradients and statistics of one process, resumes to the bit, and the
command that evaluates a run beside its control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.callbacks.metrics import read_rows
from tests.launch.cvfp_main import CONTROL, EVALUATED, FIRST, LAST, PLACES, RUNS, STAGES
from tests.launch.forked import forked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cvfp")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    done = forked(2, "tests.launch.cvfp_main", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("model, stage", [(model, stage) for model, stages in STAGES.items() for stage in stages])
def test_gradients_and_statistics_are_those_of_one_process(found: dict[str, Any], model: str, stage: int) -> None:
    differences = found["gradients"][f"{model} zero{stage}"]
    assert differences["gradient"] < 1e-5, differences
    # What is trained is reached by the loss, in every block.
    assert differences["least"] > 0
    # And an update of the engine moves it, whatever the loss is.
    assert differences["still"] == []
    assert differences["begun"] < 1e-5 and differences["statistics"] < 1e-5
    if (model, stage) in EVALUATED:
        assert differences["held out"] < 1e-4, differences


@pytest.mark.parametrize("run", RUNS)
def test_a_resume_anywhere_costs_no_bit(found: dict[str, Any], run: str) -> None:
    facts = found["resumed"][run]
    assert facts["differences"] == {name: [] for name in PLACES[run]}
    steps = {"fixed_point": FIRST.get(run, 6), "prediction": LAST}
    assert facts["phases"] == [[phase, step] for phase, count in steps.items() for step in range(1, count + 1)]
    assert facts["finite"]
    assert facts["epochs"] == [step / 3 for _, step in facts["phases"]]


def test_a_run_with_test_goes_on_without_it_into_the_second_phase(found: dict[str, Any]) -> None:
    facts = found["tested"]
    first = [["fixed_point", step] for step in range(1, 7)]
    assert facts["first"] == first
    assert facts["then"] == first + [["prediction", step] for step in range(7, 13)]
    # As if it had never been asked for.
    assert facts["differences"] == []


def test_the_suite_of_contexts_is_a_command_and_compares_with_a_control(found: dict[str, Any], folder: Path) -> None:
    run, control = folder / "straight0", folder / CONTROL
    own = {
        path: [row for row in read_rows(path / "metrics.jsonl") if row["mode"] == "val"][-1] for path in (run, control)
    }
    done = forked(1, "pipeline", "eval", str(run), "--suite", "contexts", "--control", str(control))
    assert done.returncode == 0, done.stdout + done.stderr
    written = run / "evals" / "checkpoint-12" / "contexts"
    scalars = json.loads((written / "evaluation.json").read_text())["scalars"]
    # Each model's as its own run has measured it on these documents.
    for name, path in (("model", run), ("control", control)):
        assert scalars[f"prediction/ppl_{name}"] == pytest.approx(own[path]["ppl"], rel=1e-4)
    ratio = scalars["prediction/ppl_control"] / scalars["prediction/ppl_model"]
    assert ratio != 1 and scalars["prediction/ratio_control"] == pytest.approx(ratio, rel=1e-6)
    assert scalars["prediction/ratio_control_low"] <= ratio <= scalars["prediction/ratio_control_high"]
    assert [*written.glob("*.png")]


def test_a_run_that_is_no_control_is_refused_in_a_line(found: dict[str, Any], folder: Path) -> None:
    run, other = folder / "straight0", folder / "tested"
    written = {*folder.rglob("*")}
    done = forked(1, "pipeline", "eval", str(run), "--suite", "contexts", "--control", str(other))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        f"mnemos: --control {other / 'checkpoints' / 'checkpoint-12'}: was trained with its contexts: give a run with"
        " --model.prediction.context zero"
    )
    assert {*folder.rglob("*")} == written
