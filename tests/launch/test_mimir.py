"""Peptide diffusion on two data ranks: gradients and held-out numbers of one rank, and resumes to the bit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.launch.forked import forked
from tests.launch.mimir_main import LAST, MIDDLE, RUNS, STAGES


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("mimir")
    done = forked(2, "tests.launch.mimir_main", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("model, stage", [(model, stage) for model, stages in STAGES.items() for stage in stages])
def test_gradients_are_those_of_one_process_without_deepspeed(found: dict[str, Any], model: str, stage: int) -> None:
    differences = found["gradients"][f"{model} zero{stage}"]
    assert differences["gradient"] < 1e-5, differences["parameter"]
    assert differences["norm"] < 1e-5
    assert differences["held out"] < 1e-5


@pytest.mark.parametrize("run", RUNS)
def test_a_resume_in_the_middle_of_an_epoch_costs_no_bit(found: dict[str, Any], run: str) -> None:
    facts = found["resumed"][run]
    straight, resumed = facts["losses"]
    assert len(straight) == LAST and resumed == straight[MIDDLE:]
    assert facts["differences"] == []
    epoch, offset = facts["cursor"]
    assert epoch == 0 and offset == 16 * MIDDLE
    assert facts["epochs"][0] < 1 < facts["epochs"][-1]
    assert facts["average"] == ("optimizer__ema_decay" in RUNS[run])
