"""A kernel that breaks the device in its check ends the run; one that cannot be checked in a graph says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.ops import native
from pipeline.ops.affine_scan import affine_scan

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
BROKEN = """
import sys
import torch
from pipeline import cli
from pipeline.ops import miras_scan, scan_native

def check(device, dtype, key_dim):
    return float(torch.zeros(4, device=device)[torch.tensor([7], device=device)])  # a device-side assertion fails

def train(words):
    q = torch.ones(1, 8, 1, 32, device="cuda")
    gate = torch.full((1, 8, 1), 0.5, device="cuda")
    miras_scan(q, q, q, gate, gate, gate)

scan_native.self_check = check
cli.COMMANDS["train"] = train
sys.exit(cli.main(["train"]))
"""


def test_a_device_that_is_lost_in_a_check_ends_the_run() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr[-4000:]
    assert [line for line in lines if line.startswith("mnemos: cuda:0 is lost: the check of the native kernel")]
    assert not any("Traceback" in line for line in lines)


def test_a_first_use_within_the_capture_of_a_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (torch.rand(1, 50, 6, device="cuda") for _ in range(2))
    expected = affine_scan(a, b, backend="cuda")[0]
    monkeypatch.setattr(native, "_checked", {})
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.graph(graph),
        pytest.raises(RuntimeError, match="for the first time while a CUDA graph is captured"),
    ):
        affine_scan(a, b)
    torch.cuda.synchronize()
    # The process goes on, and after a first use outside a capture is possible.
    assert torch.equal(affine_scan(a, b)[0], expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h = affine_scan(a, b)[0]
    graph.replay()
    assert torch.equal(h, expected)
