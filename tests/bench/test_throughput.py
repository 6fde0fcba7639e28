"""The throughput bench measures every length and says on what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.bench.throughput import _planned_memory, check_share, render
from pipeline.errors import UserError
from pipeline.host import hardware
from pipeline.plan import PlanOptions, make_plan
from pipeline.recipes.miras import miras_64k
from tests.launch.harness import single


def test_lengths_are_measured_and_written(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = single(
        "pipeline", "bench", "throughput", "--lengths", "128", "512", "--bench-steps", "2", "--json", str(out),
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
