"""Whole runs through the real launchers: what they write, and that stopping and resuming changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.callbacks.metrics import read_rows
from pipeline.checkpoint.manifest import problems
from tests.launch.forked import forked
from tests.launch.harness import ROOT, environment, launch, single

SMALL = ["--sequence-length", "256", "--batch-size", "2", "--evaluation.steps", "2", "--eval-every", "0"]
LAST = 12


def rows(folder: Path, mode: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row["mode"] == mode]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder, "train")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LAST steps in one go, through launch.sh."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    command = [
        "./launch.sh",
        "--num_gpus",
        "2",
        "miras_tiny",
        *SMALL,
        "--steps",
        str(LAST),
        "--output-dir",
        str(folder),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same steps with a stop in the middle, mid-document, from which ranks of the deepspeed launcher go on."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    words = ["pipeline", "train", "miras_tiny", *SMALL, "--steps", str(LAST), "--output-dir", str(folder)]
    words.append("--report.no-plots")
    for start, more in ((forked, ["--stop-after", "5"]), (launch, ["--resume", "must"])):
        done = start(2, *words, *more)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_run_directory_holds_what_was_promised(straight: Path) -> None:
    for name in ("config.yaml", "ds_config.json", "run.json", "training.log", "metrics.jsonl", "checkpoints/latest"):
        assert (straight / name).stat().st_size > 0, name
    run = json.loads((straight / "run.json").read_text())
    assert run["status"] == "finished" and run["last_checkpoint"] == f"checkpoint-{LAST}"
    assert run["versions"]["deepspeed"] and run["machine"]["sequence"] == 2
    assert yaml.safe_load((straight / "config.yaml").read_text())["parallel"]["sequence"] == 2
    assert json.loads((straight / "ds_config.json").read_text())["zero_optimization"]["stage"] == 3
    for name in ("training.png", "perplexity_by_position.png", "recall_by_distance.png"):
        assert (straight / "plots" / name).read_bytes().startswith(b"\x89PNG"), name


def test_held_out_bits_per_byte_fall(straight: Path) -> None:
    first, last = rows(straight, "val")
    assert 7.5 < first["bpb"] < 8.5
    assert last["bpb"] < first["bpb"] - 0.8
    assert first["memory_off/bpb"] == first["bpb"], "the memory adds nothing before the first step"


def test_every_step_is_logged_with_its_health(straight: Path) -> None:
    train = rows(straight, "train")
    assert [row["step"] for row in train] == list(range(1, LAST + 1))
    for row in train:
        assert row["tok_s"] > 0 and row["peak_memory"] > 2**20 and row["mfu"] is None
        assert {"norm_M", "norm_S", "memory/alpha", "memory/theta", "memory/half_life", "beyond_window"} <= row.keys()
    assert [row["tokens"] for row in train] == sorted({row["tokens"] for row in train})


def test_a_checkpoint_is_whole(straight: Path) -> None:
    checkpoint = straight / "checkpoints" / (straight / "checkpoints" / "latest").read_text().strip()
    assert problems(checkpoint, hashes=True) == []
    names = {path.name for path in checkpoint.iterdir()}
    assert {"trainable.safetensors", "trainer_state.json", "loader.json", "config.yaml", "manifest.json"} <= names
    assert {"rng-00000.pt", "rng-00001.pt", "carry-00000.safetensors", "carry-00001.safetensors"} <= names
    assert not list((straight / "checkpoints").glob(".*")), "nothing half-written is left"


def test_stopping_and_resuming_changes_no_bit(straight: Path, resumed: Path) -> None:
    assert losses(resumed) == losses(straight)
    for mode in ("train", "val"):
        for one, other in zip(rows(straight, mode)[-1:], rows(resumed, mode)[-1:], strict=True):
            for key in ("loss", "tokens", "norm_M", "memory_off/loss"):
                assert one.get(key) == other.get(key)
    newest = [folder / "checkpoints" / f"checkpoint-{LAST}" / "trainable.safetensors" for folder in (straight, resumed)]
    assert newest[0].read_bytes() == newest[1].read_bytes()


def test_another_split_of_the_same_ranks_goes_on_with_the_same_streams(
    straight: Path, resumed: Path, tmp_path: Path
) -> None:
    # From two sequence ranks to two data ranks: heads and streams of the carry change places, mid-document.
    words = ["pipeline", "train", "miras_tiny", *SMALL, "--batch-size", "1", "--parallel.sequence", "1"]
    words += ["--steps", str(LAST), "--resume", str(resumed / "checkpoints" / "checkpoint-5"), "--report.no-plots"]
    done = forked(2, *words, "--output-dir", str(tmp_path / "split"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "split") == pytest.approx(losses(straight)[5:], rel=1e-5)


def test_a_refused_resume_leaves_the_run_as_it_is(straight: Path) -> None:
    before = {path: path.read_bytes() for path in straight.glob("*.*")}
    words = ["pipeline", "train", "miras_tiny", *SMALL, "--output-dir", str(straight), "--steps", str(LAST + 1)]
    refusals = (
        (["--batch-size", "3"], "2 sequences per step"),
        (["--model.attention.window", "32"], "--model.attention.window 64, this run has 32"),
    )
    for more, reason in refusals:
        done = forked(1, *words, *more)
        assert done.returncode == 2 and reason in done.stderr, done.stderr
    assert before == {path: path.read_bytes() for path in straight.glob("*.*")}


def test_a_finished_run_is_left_alone_and_says_what_to_do(straight: Path) -> None:
    def files() -> dict[str, tuple[bytes, int]]:
        """Content and time of change of everything but the lock, which is taken."""
        found = [path for path in straight.rglob("*") if path.is_file() and path.name != ".lock"]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}

    before = files()
    words = ["train", "miras_tiny", *SMALL, "--steps", str(LAST), "--output-dir", str(straight)]
    done = forked(2, "pipeline", *words)
    assert done.returncode == 0
    assert done.stdout.count("already finished at step 12") == 1
    for advice in ("larger --steps", "another --output-dir", f"mnemos eval {straight}"):
        assert advice in done.stdout
    assert files() == before


def test_a_checkpoint_is_evaluated_on_one_rank(straight: Path) -> None:
    done = single("pipeline", "eval", str(straight), "--evaluation.steps", "2")
    assert done.returncode == 0, done.stderr
    (folder,) = (straight / "evals").iterdir()
    found = json.loads((folder / "evaluation.json").read_text())["scalars"]
    assert found["loss"] == pytest.approx(rows(straight, "val")[-1]["loss"], rel=1e-5)
    assert "Perplexity by position" in done.stdout and "Recall by distance" in done.stdout
    assert (folder / "perplexity_by_position.png").exists()


def test_weights_alone_start_a_run_of_another_layout(straight: Path, tmp_path: Path) -> None:
    words = ["pipeline", "train", "miras_tiny", *SMALL]
    newest = straight / "checkpoints" / f"checkpoint-{LAST}"
    out = tmp_path / "warm"
    done = forked(1, *words, "--output-dir", str(out), "--init-from", str(newest), "--steps", "1", "--report.no-plots")
    assert done.returncode == 0, done.stderr
    assert rows(out, "val")[0]["loss"] == pytest.approx(rows(straight, "val")[-1]["loss"], rel=1e-5)


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "dry"
    done = forked(1, "pipeline", "train", "miras_tiny", *SMALL, "--dry-run", "--output-dir", str(out))
    assert done.returncode == 0, done.stderr
    assert "dry run: loss 5." in done.stdout
    assert not out.exists()


def test_torchrun_runs_it_unchanged(tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "pipeline",
        "train", "miras_tiny", *SMALL, "--steps", "1", "--output-dir", str(tmp_path / "run"), "--report.tensorboard",
        "--profile", "1", "--report.no-plots",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 1
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small file system needs root")
def test_no_space_left_is_one_line_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this machine does not let us mount a file system")
    try:
        out = disk / "run"
        words = ["pipeline", "train", "miras_tiny", *SMALL, "--steps", "3", "--save-every", "1", "--report.no-plots"]
        # Two checkpoints of about 9 MB fit beside this file, a third does not.
        (disk / "filler").write_bytes(bytes(2**20))
        done = forked(1, *words, "--stop-after", "1", "--output-dir", str(out))
        assert done.returncode == 0, done.stderr
        free = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - 3 * 2**20))
        done = forked(1, *words, "--output-dir", str(out))
        assert done.returncode == 2, done.stderr
        line = [line for line in done.stderr.splitlines() if line.startswith("mnemos: ")]
        assert len(line) == 1 and "make room" in line[0]
        assert "Traceback" not in done.stderr
        assert (out / "checkpoints" / "latest").read_text() == "checkpoint-1\n"
        assert problems(out / "checkpoints" / "checkpoint-1", hashes=True) == []
        assert not list((out / "checkpoints").glob(".checkpoint*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_error_of_one_rank_stops_all_with_one_line(tmp_path: Path) -> None:
    # Two data ranks; the second document of the second rank's stream is no JSON.
    data = tmp_path / "data.jsonl"
    good = json.dumps({"text": "x" * 1600})
    data.write_text("".join(f"{good}\n" for _ in range(40)) + "{broken\n" + f"{good}\n" * 3)
    words = ["train", "miras_tiny", *SMALL, "--data.path", str(data), "--parallel.sequence", "1", "--zero", "zero1"]
    words += ["--data.holdout", "0.1"]
    done = launch(
        2, "pipeline", *words, "--steps", "200", "--output-dir", str(tmp_path / "run"), "--report.log-every", "50"
    )
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("mnemos: ")]
    assert len(lines) == 1 and "data.jsonl" in lines[0] and "41" in lines[0]
    assert "Traceback" not in done.stdout + done.stderr
