"""The command `plan`: what it prints, for one device and for all of them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.commands.flags import parse_run, split_flags
from pipeline.host.devices import DEVICES, find_device
from pipeline.plan import PlanOptions, command, make_plan
from tests.plan.sizes import BACKBONE, WIDTH, memory_parameters

MEMORY = memory_parameters(WIDTH, layers=4, heads=16, dim=128, conv=4, persistent=16, rank=64)


def printed(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", *shlex.split(words)]) == 0
    return capsys.readouterr().out


def test_flags_of_the_plan_and_of_the_recipe_are_told_apart() -> None:
    words = "miras_64k --ranks 8 --bs 2 --device=B300 --data.path a b --utilisation 0.5 --config x".split()
    own, rest = split_flags(words, ("ranks", "device", "utilisation"))
    assert own == ["--ranks", "8", "--device=B300", "--utilisation", "0.5"]
    assert rest == ["miras_64k", "--bs", "2", "--data.path", "a", "b", "--config", "x"]


def test_the_command_counts_ranks_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("miras_tiny --ranks 4 --bs 2 --device B200", capsys)
    assert out.startswith("miras_tiny on 4 x B200, zero3, sequence 2")
    assert f"{2 * 2 * 1024:,}" in out


def test_one_plan_shows_exact_counts_memory_and_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("miras_64k --ranks 4 --device B300 --reserve 8", capsys)
    assert "4 x B300" in out and "zero2" in out
    assert f"{BACKBONE + MEMORY:,}" in out and f"{MEMORY:,} (4.4%)" in out
    assert "2,097,152" in out and "104,857,600,000" in out
    assert "40% of the peak" in out and "268.59 GiB, 8.00 GiB in reserve" in out
    assert "does not fit" not in out


def test_a_plan_that_does_not_fit_says_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("miras_64k --ranks 4 --device H100", capsys)
    assert "does not fit on H100; by the same estimate it does with\n  --batch-size 4 --grad-accum 2" in out
    again = printed("miras_64k --ranks 4 --device H100 --batch-size 4 --grad-accum 2", capsys)
    assert "does not fit" not in again


def test_a_plan_that_nothing_helps_says_that(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("miras_64k --device L4 --reserve 22", capsys)
    assert "largest --batch-size   none" in out
    assert out.endswith("does not fit on L4, nor with any other sharding, recomputation or batch size\n")


def test_all_devices_stand_in_one_table_with_flags_that_make_them_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = "miras_128k --zero zero1 --bs 4"
    title, head, *lines = printed(f"{words} --all-devices", capsys).splitlines()
    assert title.startswith(f"./launch.sh --num_gpus 1 {words}: ") and head.endswith("flags to add")
    assert [line.split("  ")[0] for line in lines] == [device.name for device in DEVICES]
    start = head.index("flags to add")
    found = {line.split("  ")[0]: line[start:] for line in lines}
    assert found["H200"] == "" and "fits" in next(line for line in lines if line.startswith("H200 "))
    assert found["L4"] == "does not fit"
    for name in ("H100", "A100 40GB", "L40S"):
        given = f"{words} {found[name]}".split()
        plan = make_plan(parse_run(given, "plan"), PlanOptions(device=name))
        assert plan.fits and f"  {plan.memory / 2**30:.1f}  " in next(
            line for line in lines if line.startswith(f"{name} ")
        )


def test_devices_without_bfloat16_are_told_another_precision(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [find_device(name) for name in ("H100", "T4", "V100")]
    monkeypatch.setattr(command, "DEVICES", few)
    lines = printed("miras_recall --precision bf16 --all-devices", capsys).splitlines()
    advised = [line.split("  ")[0] for line in lines if line.endswith("--precision fp16")]
    assert advised == ["T4", "V100"]


def test_a_plan_needs_no_network_and_no_gpu(tmp_path: Path) -> None:
    """Also with nothing of the hub on disk, and any connection an error."""
    script = """
import socket, sys
def refuse(*arguments, **options): raise RuntimeError("a plan went to the network")
socket.getaddrinfo = socket.socket.connect = socket.socket.connect_ex = refuse
from pipeline.cli import main
sys.exit(main(["plan", "miras_64k"]))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("DS_ACCELERATOR", None)
    root = Path(__file__).parents[2]
    answer = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert f"{BACKBONE + MEMORY:,}" in answer.stdout
    assert answer.stderr == ""
