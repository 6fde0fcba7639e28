"""The fixed point of contexts on two data ranks: gradients and statistics of one process, and resumes to the bit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.launch.cvfp_main import EVALUATED, FIRST, LAST, PLACES, RUNS, STAGES
from tests.launch.forked import forked


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("cvfp")
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
