"""Starts real launches: the deepspeed launcher, several ranks on this machine's CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """The environment that launch.sh gives the ranks of a CPU run."""
    binaries = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


def launch(ranks: int, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_gpus RANKS --module WORDS`; output is captured, nothing is checked."""
    command = [
        str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port()),
        "--module", *words,
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)


def single(*words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`python -m WORDS`: one rank, no launcher."""
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)
