"""The throughput bench measures every length and says on what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.bench.throughput import _planned_memory
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
    assert found["versions"]["torch"] and found["machine"]["device"]["kind"] == "cpu"
    assert "n/a" in done.stdout and "512" in done.stdout


def test_the_plan_of_the_device_stands_beside_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    config = miras_64k()
    monkeypatch.setattr(hardware, "on_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert _planned_memory(config, 1) == make_plan(config, PlanOptions(device="H100")).memory
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA X1")
    assert _planned_memory(config, 1) is None
