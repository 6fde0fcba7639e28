"""A file of a run that cannot be written is named in one line, and run.json says how the run ended all the same."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from pipeline import train
from pipeline.callbacks import Callback
from pipeline.callbacks.metrics import MetricsFile
from pipeline.callbacks.progress import ProgressLines
from pipeline.errors import RankError
from pipeline.files.output import overwrite_json, write_json, writing
from pipeline.run_folder import write_run_file
from pipeline.system import Evaluation
from tests.checkpoint.small_runs import a_run

FULL = Path("/dev/full")
"""The device that is always full."""


def fill_disk_under(path: Path) -> None:
    """From now on what is written to `path` meets a full disk."""
    path.unlink(missing_ok=True)
    path.symlink_to(FULL)


@pytest.mark.parametrize(
    ("number", "fix"),
    [(errno.ENOSPC, "make room there"), (errno.EDQUOT, "make room there"), (errno.EROFS, "make it writable"),
     (errno.EIO, "make it writable"), (errno.ENOENT, "make it writable")],
)  # fmt: skip
def test_what_cannot_be_written_is_named_with_the_fix(number: int, fix: str) -> None:
    with pytest.raises(RankError) as caught, writing(Path("runs/one/metrics.jsonl")):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == (
        f"runs/one/metrics.jsonl: not written ({os.strerror(number)}): {fix} and start again; a run goes on from its"
        " last checkpoint"
    )


def test_what_goes_wrong_otherwise_is_not_laid_on_the_disk() -> None:
    with pytest.raises(ZeroDivisionError), writing(Path("x")):
        raise ZeroDivisionError


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"status": "running"})
    (tmp_path / ".run.json.partial").symlink_to(FULL)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"status": "failed"})
    assert json.loads(path.read_text()) == {"status": "running"}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"], "nothing half-written takes room"


def test_a_json_file_is_written_over_within_its_own_bytes(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"status": "running", "step": 9})
    size, inode = path.stat().st_size, path.stat().st_ino
    for status in ("failed", "stopped", "failed"):
        overwrite_json(path, {"status": status, "step": 10})
        assert json.loads(path.read_text()) == {"status": status, "step": 10}
        assert (path.stat().st_size, path.stat().st_ino) == (size, inode)
    before = path.read_bytes()
    with pytest.raises(OSError, match="has room for"):
        overwrite_json(path, {"status": "x" * size})
    assert path.read_bytes() == before


def test_a_run_that_a_full_disk_ends_is_not_left_as_running(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    write_run_file(run, "running")
    run.progress.step, run.last_checkpoint = 123_456, "checkpoint-100000"
    (tmp_path / ".run.json.partial").symlink_to(FULL)
    write_run_file(run, "failed")
    found = json.loads((tmp_path / "run.json").read_text())
    assert (found["status"], found["last_checkpoint"], found["progress"]["step"]) == (
        "failed",
        "checkpoint-100000",
        123456,
    )


def test_a_run_file_that_cannot_be_written_at_all_is_named(tmp_path: Path) -> None:
    (tmp_path / ".run.json.partial").symlink_to(FULL)
    with pytest.raises(RankError, match=rf"{tmp_path}/run\.json: not written \(No space left on device\)"):
        write_run_file(a_run(tmp_path), "running")


def test_every_file_of_a_run_is_named_when_the_disk_is_full(tmp_path: Path) -> None:
    run = a_run(tmp_path, step=1)
    metrics, lines = MetricsFile(run), ProgressLines(run)
    evaluation = Evaluation({"loss": 2.0})
    jobs = {
        "metrics.jsonl": lambda: metrics.on_evaluation(1, evaluation),
        "training.log": lambda: lines.on_checkpoint("checkpoint-1"),
    }
    for name, job in jobs.items():
        job()
        fill_disk_under(tmp_path / name)
        with pytest.raises(RankError, match=rf"{tmp_path / name}: not written \(No space left on device\): make room"):
            job()


def test_a_resume_that_cannot_clean_the_metrics_leaves_them_as_they_are(tmp_path: Path) -> None:
    metrics = MetricsFile(a_run(tmp_path, step=1))
    metrics.on_evaluation(1, Evaluation({"loss": 2.0}))
    before = metrics.path.read_bytes()
    fill_disk_under(tmp_path / ".metrics.jsonl.partial")
    with pytest.raises(RankError, match=r"metrics\.jsonl: not written"):
        metrics.on_start()
    assert metrics.path.read_bytes() == before


def test_the_log_takes_the_name_of_a_folder_that_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"run-\xff")
    folder.mkdir()
    ProgressLines(a_run(folder)).on_checkpoint("checkpoint-1")
    assert "run-\\udcff/checkpoints/checkpoint-1" in (folder / "training.log").read_text()


@pytest.mark.parametrize("name", ["plots/training.png", None])
def test_a_full_disk_under_a_library_ends_a_run_as_under_ourselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str | None
) -> None:
    """Pictures, events and traces are written by libraries, whose errors may name no file."""

    class Picture(Callback):
        def on_start(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([] if name is None else [name]))

    run = a_run(tmp_path)
    monkeypatch.setattr(train, "create_callbacks", lambda run: [Picture()])
    trainer = train.Trainer(run)
    trainer.begin(None)
    with pytest.raises(RankError, match=rf"{name or tmp_path}: not written \(No space left on device\)") as caught:
        trainer.execute()
    assert capsys.readouterr().err == f"mnemos: {caught.value}\n" and caught.value.reported
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"
