"""What the native scan needs beside its results, by the figures of its sources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pipeline.ops.scan_native import WORKSPACE, workspace_bytes

SOURCES = Path(__file__).resolve().parents[2] / "kernels" / "miras_scan" / "cuda"
SQUARE, COEFFICIENTS, STATE = 64 * 64, 8 * 64, 128 * 128


def test_the_workspace_is_that_of_the_kernels() -> None:
    shift = re.search(r"kWorkspace = int64_t\{1\} << (\d+);", (SOURCES / "arguments.cuh").read_text())
    assert shift is not None and 2 ** int(shift[1]) == WORKSPACE


def test_a_short_call_takes_scratch_memory_for_all_of_its_chunks() -> None:
    """Three chunks of two rows; the backward pass replays the states between those that are kept."""
    backward = 2 * 3 * 4 * (SQUARE + COEFFICIENTS + 64 * 128 + 4 * STATE)
    assert workspace_bytes(2, 130, 128, 128, torch.bfloat16) == backward


def test_with_a_state_kept_for_every_chunk_the_forward_pass_makes_none() -> None:
    """float32 at key dim 64 or less: an interval is a chunk."""
    state = 64 * 64
    backward = 3 * 4 * (SQUARE + COEFFICIENTS + 64 * 64 + 2 * state)
    assert workspace_bytes(1, 192, 64, 64, torch.float32) == backward


@pytest.mark.parametrize("rows", [1, 16, 128])
def test_a_long_call_keeps_within_the_workspace(rows: int) -> None:
    assert 0.9 * WORKSPACE < workspace_bytes(rows, 2**20, 128, 128, torch.bfloat16) <= WORKSPACE


def test_so_many_rows_that_one_interval_is_larger_take_what_that_needs() -> None:
    """An interval of 512 tokens is 8 chunks."""
    rows = 1024
    interval = 8 * 4 * (SQUARE + COEFFICIENTS + 64 * 128 + 4 * STATE)
    assert workspace_bytes(rows, 65_536, 128, 128, torch.bfloat16) == rows * interval > WORKSPACE
