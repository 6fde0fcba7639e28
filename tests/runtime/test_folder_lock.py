"""Two runs never write to one folder, and one that dies keeps nobody out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.run_folder import open_folder
from pipeline.runtime.folder_lock import FolderLock
from tests.checkpoint.small_runs import a_run

HOLD = """
import sys, time
from pathlib import Path
from pipeline.runtime.folder_lock import FolderLock
lock = FolderLock()
lock.acquire(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_kept_out_until_this_one_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with FolderLock() as lock, pytest.raises(UserError, match="another run is writing there"):
            lock.acquire(tmp_path, timeout=0.3)
        assert capsys.readouterr().err.count("waiting for another run") == 1
        other.kill()
        with FolderLock() as lock:
            lock.acquire(tmp_path)
    finally:
        other.kill()
        other.wait()


def test_it_is_let_go_of_at_the_end_and_taken_once(tmp_path: Path) -> None:
    for _ in range(2):
        with FolderLock() as lock:
            assert lock.acquire(tmp_path, timeout=0)
            assert not lock.acquire(tmp_path, timeout=0)
            with FolderLock() as second, pytest.raises(UserError):
                second.acquire(tmp_path, timeout=0)


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with FolderLock() as lock:
        lock.acquire(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_came_and_went_while_another_waited_is_not_begun_anew(tmp_path: Path) -> None:
    """The one that waited has looked for checkpoints before there were any, in a folder that was not there to lock."""
    run = a_run(tmp_path)
    (run.folder / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    with run.lock, pytest.raises(UserError, match="another run has saved there meanwhile: start again"):
        open_folder(run)
    assert {path.name for path in run.folder.iterdir()} == {"checkpoints", ".lock"}
