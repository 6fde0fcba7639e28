"""A stop and a resume cost no bit, for every stage, mid-epoch and mid-document, with accumulation and the carry."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from tests.launch.forked import forked
from tests.launch.resume_main import LAST, MIDDLE, STAGES, cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    draw = random.Random(3)
    texts = ["".join(draw.choices("abcdefgh ", k=draw.randrange(40, 140))) for _ in range(9)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = forked(2, "tests.launch.resume_main", str(folder), str(data), timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def named(folder: Path) -> dict:
    return json.loads((folder / "named.json").read_text())


@pytest.mark.timeout(600)
def test_ranks_that_start_in_different_seconds_share_the_folder_that_the_time_names(named: dict) -> None:
    (folder,) = named["folders"]
    assert re.fullmatch(r"outputs/exp/\d{8}_\d{6}", folder)
    assert {"checkpoints", "config.yaml", "metrics.jsonl", "run.json"} <= set(named["files"])


@pytest.mark.timeout(600)
def test_heavy_metrics_are_wanted_where_a_step_is_logged(named: dict) -> None:
    assert {int(step) for step, wanted in named["wanted"].items() if wanted} == {3, 5, 6, 7}
    assert len(named["wanted"]) == 7
    assert [step for step in named["rows"] if step] == [3, 5, 6, 7, 7], "with the last step's evaluation"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", cases())
def test_a_resumed_run_ends_with_the_same_bits(found: dict[str, dict], case: str) -> None:
    straight, resumed = found[case]["losses"]
    assert len(straight) == LAST
    assert resumed == straight if found[case]["stopped"] else resumed == straight[MIDDLE:]
    assert found[case]["differences"] == []
    assert found[case]["kept"][-1] == "latest" and len(found[case]["kept"]) <= 3


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", STAGES)
def test_a_resume_from_the_checkpoint_of_the_start_is_a_fresh_start(folder: Path, stage: int) -> None:
    found = json.loads((folder / "start.json").read_text())[f"zero{stage}"]
    assert found["kept"] == ["checkpoint-0", "checkpoint-1", "checkpoint-2", "latest"]
    assert found["resumed"] == ["checkpoint-2", "latest"]
    assert found["differences"] == []
    begun, *others = found["losses"]
    assert len(others) == (3 if stage == STAGES[0] else 1)
    assert len(begun) == 4 and all(other == begun for other in others), "of an evaluation, two steps and an evaluation"
    # Of no steps, then two more.
    assert found["untrained"] == (["checkpoint-0", "checkpoint-2", "latest"] if stage == STAGES[0] else [])
    # One with no step left saves what it stands at in its own folder.
    assert found["ended"] == (["checkpoint-2", "latest"] if stage == STAGES[-1] else []) and found["changed"] == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["olmo", "olmo2"])
def test_training_goes_on_by_way_of_olmos_layout_bit_for_bit(folder: Path, kind: str) -> None:
    found = json.loads((folder / "native.json").read_text())[kind]
    here, there = found["losses"]
    assert found["steps"] == [3, 4] and len(here) == 2 and here == there
    assert found["differences"] == []


def test_a_resume_keeps_the_loss_scale_which_is_logged_in_float16_alone(found: dict[str, dict]) -> None:
    for case, facts in found.items():
        straight, resumed = facts["scales"]
        assert len(straight) == LAST and resumed == (straight if facts["stopped"] else straight[MIDDLE:])
        assert straight[0] == 2**16 if "fp16" in case else straight == [None] * LAST


def test_the_stop_lies_within_documents_and_epochs(found: dict[str, dict]) -> None:
    for case, facts in found.items():
        assert any(facts["epochs"]) and any(facts["offsets"]), case


def test_frozen_weights_are_named_by_their_hash(found: dict[str, dict]) -> None:
    hashes = {case: facts["frozen"] for case, facts in found.items()}
    frozen = [value for case, value in hashes.items() if "frozen" in case]
    assert frozen[0] == frozen[1] and len(frozen[0]["sha256"]) == 64 and frozen[0]["parameters"] > 500_000
    assert all(value is None for case, value in hashes.items() if "frozen" not in case)
