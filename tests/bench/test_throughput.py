"""The throughput bench measures every length and says on what."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.bench.throughput import _planned_memory, check_share, reason_of, render, run_throughput
from pipeline.commands.flags import parse_run
from pipeline.errors import UserError
from pipeline.host import hardware
from pipeline.plan import PlanOptions, make_plan
from pipeline.recipes.miras import miras_64k


def test_lengths_are_measured_and_written(tmp_path: Path, bench: Callable) -> None:
    out = tmp_path / "bench.json"
    done = bench(
        "throughput", "--lengths", "128", "512", "--bench-steps", "2", "--json", str(out),
        "miras_tiny", "--batch-size", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [row["sequence_length"] for row in found["rows"]] == [128, 512]
    for row in found["rows"]:
        assert row["tok_s"] > 0 and row["peak_memory"] > 2**20 and row["mfu"] is None
        assert row["seconds_per_token"] == row["seconds"] / row["tokens_per_step"]
        assert row["planned_memory"] is None and row["first_step"]["loss"] > 0 and row["first_step"]["grad_norm"] > 0
        assert 0 < row["matrix_share"] < 1
        assert row["matrix_share"] == pytest.approx(row["tok_s"] * row["flops_per_token"] / row["matrix_flops"])
    assert found["versions"]["torch"] and found["machine"]["device"]["kind"] == "cpu"
    header, *rows, note = done.stdout.splitlines()[1:]
    assert "matmul" in header and [line.split()[0] for line in rows] == ["128", "512"] and "GFLOP/s" in note


def test_the_plan_of_the_device_stands_beside_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    config = miras_64k()
    monkeypatch.setattr(hardware, "on_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert _planned_memory(config, 1) == make_plan(config, PlanOptions(device="H100")).memory
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA X1")
    assert _planned_memory(config, 1) is None


def row(**changes: object) -> dict[str, object]:
    return {
        "sequence_length": 2048, "seconds": 1.0, "tok_s": 1e4, "seconds_per_token": 1e-4, "peak_memory": 2**30,
        "time_per_token_ratio": 1.0, "mfu": 0.4, "matrix_flops": None, "matrix_share": None, **changes,
    }  # fmt: skip


def test_more_than_the_device_can_do_is_an_error() -> None:
    check_share(row(mfu=1.0))
    check_share(row(mfu=None, matrix_share=1.0))
    with pytest.raises(UserError, match=r"MFU at 2048 tokens is 111%.*correct --report.peak-tflops"):
        check_share(row(mfu=1.114))
    with pytest.raises(UserError, match=r"reach 130% of the rate of matrix products.*idle machine"):
        check_share(row(mfu=None, matrix_share=1.3))


def test_an_unknown_device_has_no_mfu() -> None:
    device = {"device": {"kind": "cuda", "name": "NVIDIA X1"}, "ranks": 1}
    text = render({"recipe": "x", "machine": device, "versions": {"torch": "2"}, "rows": [row(mfu=None), row()]})
    _, header, unknown, known = text.splitlines()
    assert "MFU" in header and unknown.split()[-2] == "n/a" and known.split()[-2] == "40.0%"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--repeats 0", "--repeats is 0: give 1 or more"), ("--ranks 0", "--ranks is 0: give 1 or more"),
        ("--bench-steps 0", "--bench-steps is 0: give 1 or more"), ("--bench-steps=-1", "--bench-steps is -1"),
        ("--lengths 128 0", "--lengths is 128 0: give 1 token or more each"),
    ],
)  # fmt: skip
def test_what_measures_nothing_is_refused(words: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", None)  # before any process starts
    with pytest.raises(UserError, match=message) as refusal:
        run_throughput(words.split())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "stderr, reason",
    [
        ("a warning\nmnemos: --lr is inf: give less\nthe launcher ends", "--lr is inf: give less"),
        ("torch.OutOfMemoryError: CUDA out of memory\nthe launcher ends", "torch.OutOfMemoryError: CUDA out of memory"),
        ("one\ntwo\n", "two"),
        ("", "no output"),
    ],
)
def test_the_reason_of_a_case_is_its_own_line(stderr: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 2, "", stderr)
    assert reason_of(done) == reason
    monkeypatch.setattr("subprocess.run", lambda *words, **options: done)
    with pytest.raises(UserError) as refusal:
        run_throughput(["olmo_tiny"])
    assert str(refusal.value) == f"the run at 256 tokens failed: {reason}"


def test_a_duration_of_the_command_is_not_that_of_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """--steps stands in the words of a case, which a longer --max-duration beside it would be refused for."""
    begun: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        begun.append(command)
        return subprocess.CompletedProcess([], 2, "", "")

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(UserError, match="no output"):
        run_throughput(["olmo_tiny", "--max_duration=7640"])
    (command,) = begun
    case = command[command.index("throughput-case") + 1 :]
    assert parse_run(case, "bench throughput-case", ranks=1).steps == 4
