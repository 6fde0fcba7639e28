"""Real launches that are told to stop, at any place: all ranks save the last completed step, and lose nothing."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path

import pytest

from pipeline.callbacks.metrics import read_rows
from pipeline.checkpoint.manifest import problems
from tests.launch.forked import Forked, forked
from tests.launch.harness import Started

SMALL = ["--sequence-length", "256", "--evaluation.steps", "1", "--eval-every", "0", "--grad-accum", "3"]
KILL_TIMEOUT = 30
"""Seconds after SIGTERM at which DeepSpeed's launcher kills."""
LAST = 9


def words(folder: Path, *more: str) -> list[str]:
    return ["pipeline", "train", "miras_tiny", *SMALL, "--report.no-plots", "--output-dir", str(folder), *more]


def steps(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    return [row["step"] for row in read_rows(path) if row["mode"] == "train"] if path.exists() else []


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if row["mode"] == "train"]


def catches(started: Started, rank: int, number: signal.Signals) -> bool:
    """Whether a rank has begun to note a signal, which ends it before."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        status = Path(f"/proc/{started.rank(rank).pid}/status").read_text()
        (caught,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")]
        return bool(caught >> (number - 1) & 1)
    return False


def latest(folder: Path) -> Path:
    return folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = forked(2, *words(folder, "--steps", str(LAST)))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_signal_to_one_rank_stops_all_and_costs_no_bit(straight: Path, tmp_path: Path) -> None:
    """Micro-batches take longer than the rest of a step: the signal comes in the midst of one, with gradients begun."""
    folder = tmp_path / "run"
    started = Started(2, *words(folder, "--steps", str(LAST), "--report.log-every", "1"))
    started.wait_until(lambda: len(steps(folder)) >= 4)
    began = time.monotonic()
    started.rank(1).send_signal(signal.SIGTERM)
    code = started.end()
    assert time.monotonic() - began < KILL_TIMEOUT
    text = started.text()
    assert code != 0 and "stopped (SIGTERM)" in text and "Traceback" not in text, text
    newest = latest(folder)
    assert newest.name == f"checkpoint-{steps(folder)[-1]}" and problems(newest, hashes=True) == []
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "interrupted" and run["last_checkpoint"] == newest.name
    done = forked(2, *words(folder, "--steps", str(LAST), "--resume", "must"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(folder) == losses(straight)
    name = "trainable.safetensors"
    assert (latest(folder) / name).read_bytes() == (latest(straight) / name).read_bytes()


def test_a_signal_before_the_ranks_have_met_stops_all(tmp_path: Path) -> None:
    """While it imports: a rank that ended there would be waited for."""
    folder = tmp_path / "run"
    started = Started(2, *words(folder, "--steps", "4000"))
    started.wait_until(lambda: catches(started, 1, signal.SIGTERM))
    started.rank(1).send_signal(signal.SIGTERM)
    assert not folder.exists(), "the signal came too late to test anything"
    code = started.end()
    text = started.text()
    assert code == 128 + signal.SIGTERM and "stopped (SIGTERM)" in text and "Traceback" not in text, text
    assert steps(folder) == []


def test_an_evaluation_is_not_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ["--steps", "4", "--eval-every", "2", "--evaluation.steps", "4000", "--stop-after", "3"]
    started = Forked(2, *words(folder, *more, "--grad-accum", "1", "--resume", "never"))
    # The first evaluation comes before the first step.
    started.wait_until(lambda: (folder / "training.log").exists())
    time.sleep(2)
    began = time.monotonic()
    started.rank(0).send_signal(signal.SIGINT)
    assert started.end() != 0
    assert time.monotonic() - began < KILL_TIMEOUT
    assert "stopped (SIGINT)" in started.text() and "Traceback" not in started.text(), started.text()
    assert steps(folder) == [] and not (folder / "checkpoints").exists(), "nothing was done, nothing is saved"


def test_a_deadline_of_one_rank_is_a_planned_stop_of_all(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _, *command = words(folder, "--steps", "4000", "--max-hours", "24", "--async-save", "--save-every", "2")
    done = forked(2, "tests.launch.deadline_main", str(folder), "3", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stopped (--max-hours have passed)" in done.stderr
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    newest = latest(folder)
    assert newest.name == f"checkpoint-{steps(folder)[-1]}" and problems(newest, hashes=True) == []
