"""A run that has ended is told from one that has something left, and nothing is touched to tell."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.files import checksum
from pipeline.checkpoint.finished import is_finished, nothing_left
from pipeline.checkpoint.manifest import newest, with_checksum
from pipeline.config import EpochsConfig, RunConfig
from pipeline.parallel.topology import Topology
from tests.checkpoint.small_runs import a_run, save

STEPS = 20


@pytest.fixture
def ended(tmp_path: Path):
    """The config and the checkpoint of a run that ended at `step`; `changes` are of the start after it."""

    def make(step: int = STEPS, status: str = "finished", **changes: Any) -> tuple[RunConfig, Path]:
        run = a_run(tmp_path / "run")
        run.config = dataclasses.replace(run.config, steps=STEPS)
        checkpoint = save(run, step)
        (run.folder / "run.json").write_text(json.dumps({"status": status, "evaluated": [0, step]}))
        return dataclasses.replace(run.config, **changes), checkpoint

    return make


def test_a_finished_run_says_what_to_do(ended, capsys: pytest.CaptureFixture[str]) -> None:
    config, checkpoint = ended()
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in config.output_dir.glob("*.*")}
    assert is_finished(config, checkpoint, Topology())
    out = capsys.readouterr().out
    assert out.startswith(f"{config.output_dir}: already finished at step 20 (--steps is 20)")
    for advice in ("larger --steps", "another --output-dir", "--seed", f"mnemos eval {config.output_dir}"):
        assert advice in out
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in config.output_dir.glob("*.*")}


def test_a_run_in_epochs_is_finished_until_it_is_given_other_ones(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    run.config = dataclasses.replace(run.config, steps=STEPS, epochs=EpochsConfig(train=2.5))
    checkpoint = save(run, STEPS)
    (run.folder / "run.json").write_text(json.dumps({"status": "finished", "evaluated": [0, STEPS]}))
    message = nothing_left(run.config, checkpoint)
    assert message is not None and "at step 20 (--epochs is 2.5)" in message and "give a larger --epochs" in message
    longer = dataclasses.replace(run.config, epochs=EpochsConfig(train=3.0))
    assert nothing_left(longer, checkpoint) is None


def test_a_run_that_ended_by_its_patience_says_so(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    section = dataclasses.replace(run.config.evaluation, best="loss", patience=2)
    run.config = dataclasses.replace(run.config, steps=STEPS, evaluation=section)
    run.progress.not_better = 2
    checkpoint = save(run, 7)
    (run.folder / "run.json").write_text(json.dumps({"status": "finished", "evaluated": [0, 7]}))
    for config in (run.config, dataclasses.replace(run.config, steps=2 * STEPS)):
        message = nothing_left(config, checkpoint)
        assert message is not None and "2 evaluations in a row were no better" in message
        assert "give a larger --evaluation.patience, or 0" in message
    patient = dataclasses.replace(run.config, evaluation=dataclasses.replace(section, patience=3))
    assert nothing_left(patient, checkpoint) is None


def test_a_finished_run_may_go_back(ended) -> None:
    config, checkpoint = ended(step=8)
    path = config.output_dir / "run.json"
    for last, left in (("checkpoint-20", True), ("checkpoint-8", False)):
        path.write_text(json.dumps({"status": "finished", "evaluated": [0, 8, 20], "last_checkpoint": last}))
        assert (nothing_left(config, checkpoint) is None) == left
    for status in ("finished", "stopped"):
        path.write_text(json.dumps({"status": status, "evaluated": [0, 8, 20], "last_checkpoint": "checkpoint-20"}))
        message = nothing_left(dataclasses.replace(config, stop_after=8), checkpoint)
        assert message is not None and "already stopped at step 8" in message


def test_a_run_without_patience_left_goes_on_with_more(ended) -> None:
    config, checkpoint = ended(step=7)
    section = dataclasses.replace(config.evaluation, best="loss", patience=3)
    assert nothing_left(config, checkpoint) is not None
    assert nothing_left(dataclasses.replace(config, evaluation=section), checkpoint) is None


def test_a_run_that_was_to_stop_there_says_how_to_go_on(ended) -> None:
    message = nothing_left(*ended(step=8, status="stopped", stop_after=8))
    assert message is not None
    assert "already stopped at step 8 (--stop-after is 8)" in message and "leave --stop-after out" in message


def test_fewer_steps_than_were_taken_leave_nothing_either(ended) -> None:
    config, checkpoint = ended()
    message = nothing_left(dataclasses.replace(config, steps=10), checkpoint)
    assert message is not None and "finished at step 20 (--steps is 10)" in message


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_a_run_that_ended_on_its_way_has_something_left(status: str, ended) -> None:
    """Killed behind its last save, it owes an evaluation, or the word that it is finished."""
    assert nothing_left(*ended(status=status)) is None


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '"finished"'])
def test_a_run_file_that_says_nothing_is_no_finished_run(content: str | None, ended) -> None:
    config, checkpoint = ended()
    path = config.output_dir / "run.json"
    path.unlink() if content is None else path.write_text(content)
    assert nothing_left(config, checkpoint) is None


def test_an_evaluation_that_is_owed_is_something(ended) -> None:
    config, checkpoint = ended()
    for evaluated in ([], [0], [0, 8]):
        content = {"status": "finished", "evaluated": evaluated}
        (config.output_dir / "run.json").write_text(json.dumps(content))
        assert nothing_left(config, checkpoint) is None


def test_a_finished_run_of_an_older_version_is_finished(ended) -> None:
    """Its run.json lists no evaluations; its status was written after the last of them."""
    config, checkpoint = ended()
    (config.output_dir / "run.json").write_text(json.dumps({"status": "finished"}))
    message = nothing_left(config, checkpoint)
    assert message is not None and "already finished at step 20" in message


@pytest.mark.parametrize(
    "changes",
    [{"steps": STEPS + 1}, {"dry_run": True}, {"output_dir": Path("elsewhere")}],
    ids=["more steps", "a dry run", "another folder"],
)
def test_a_start_with_something_to_do_goes_on(changes: dict[str, Any], ended) -> None:
    config, checkpoint = ended()
    assert nothing_left(dataclasses.replace(config, **changes), checkpoint) is None


def test_a_phase_may_be_longer_than_the_steps_of_the_run(ended) -> None:
    """It stopped behind them, and nothing says that it had ended."""
    assert nothing_left(*ended(step=STEPS + 1, status="stopped")) is None
    message = nothing_left(*ended(step=STEPS + 1, status="stopped", stop_after=STEPS + 1))
    assert message is not None and "already stopped at step 21 (--stop-after is 21)" in message


def test_a_phase_may_be_shorter_than_the_steps_of_the_run(ended) -> None:
    message = nothing_left(*ended(step=7))
    assert message is not None and "already finished at step 7" in message


def test_another_model_section_may_make_phases_longer(ended) -> None:
    config, checkpoint = ended()
    text = (checkpoint / "config.yaml").read_text()
    for changed, left in ((text.replace("gate_rank: ", "gate_rank: 1"), True), (text + "new_field: 3\n", False)):
        (checkpoint / "config.yaml").write_text(changed)
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["files"]["config.yaml"] = checksum(checkpoint / "config.yaml")
        (checkpoint / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
        assert (nothing_left(config, checkpoint) is None) == left
    config, checkpoint = ended(phases=("train",))
    assert nothing_left(config, checkpoint) is None


def test_a_stop_that_lies_ahead_is_something(ended) -> None:
    assert nothing_left(*ended(step=8, status="stopped", stop_after=9)) is None
    assert nothing_left(*ended(step=8, status="stopped")) is None


def test_no_checkpoint_is_no_finished_run(ended) -> None:
    config, _ = ended()
    assert nothing_left(config, None) is None
    assert newest(config.output_dir / "checkpoints") is not None
