"""The neuromorphic system on two data ranks: gradients of one process, resumes to the bit, and on one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch.forked import forked
from tests.launch.neuromorphic_main import ALONE, GRADIENTS, LAST, PLACES, RUNS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("neuromorphic")
    for ranks in (2, 1):
        done = forked(ranks, "tests.launch.neuromorphic_main", str(folder), timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result-2.json").read_text())


@pytest.mark.parametrize("phase, stage", [(phase, stage) for phase, stages in GRADIENTS.items() for stage in stages])
def test_gradients_are_those_of_one_process_without_deepspeed(found: dict[str, Any], phase: str, stage: int) -> None:
    differences = found["gradients"][f"{phase} zero{stage}"]
    assert differences["gradient"] < 1e-5, differences["parameter"]
    assert differences["held out"] < 1e-5
    assert differences["unreached"] == [], "what a phase trains is reached by its loss"


@pytest.mark.parametrize("run", RUNS)
def test_a_resume_anywhere_costs_no_bit(found: dict[str, Any], run: str) -> None:
    """Nor do validation, samples and ablations, in the middle of documents, across both switches, in lifelong mode."""
    facts = found["resumed"][run]
    assert facts["differences"] == {name: [] for name in facts["differences"]}
    assert {str(place) for place in PLACES[run]} == set(facts["differences"])
    phases = [[step, phase] for step, phase, _ in facts["losses"]]
    assert phases == [[step, "ABC"[(step - 1) // 3]] for step in range(1, LAST + 1)]


def test_rows_have_the_events_of_updates_and_streams(found: dict[str, Any]) -> None:
    events = found["resumed"]["zero1"]["events"]
    assert len(events) == LAST, "a row and a checkpoint of every step"
    for norm, high, skipped, restarts, saved in events:
        assert high == (norm >= 0.95) and skipped == 0 and restarts == saved
    assert any(high for _, high, *_ in events)


def test_a_resume_on_another_number_of_ranks_gives_the_same_losses(folder: Path, found: dict[str, Any]) -> None:
    alone = json.loads((folder / "result-1.json").read_text())["losses"]
    straight = found["resumed"]["zero1"]["losses"][ALONE:]
    assert [row[:2] for row in alone] == [row[:2] for row in straight]
    for (*_, one), (*_, other) in zip(alone, straight, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
