"""Starts real launches: the deepspeed launcher, several ranks on this machine's CPU."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from pipeline.host.local import LocalHost

ROOT = Path(__file__).resolve().parent.parent.parent


def free_port() -> int:
    return LocalHost(os.environ).free_port()


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


def launcher(ranks: int, *words: str) -> list[str]:
    """`deepspeed --num_gpus RANKS --module WORDS`."""
    return [
        str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port()),
        "--module", *words,
    ]  # fmt: skip


def launch(ranks: int, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs `launcher`'s command to its end; output is captured, nothing is checked."""
    command = launcher(ranks, *words)
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)


class Started:
    """A launch that goes on while a test does things to it."""

    def __init__(self, ranks: int, *words: str) -> None:
        self.output = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            launcher(ranks, *words), cwd=ROOT, env=environment(), stdout=self.output, stderr=subprocess.STDOUT
        )

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if f"--local_rank={rank}" in process.cmdline():
                    return process
        raise ProcessLookupError(f"rank {rank} is not running: {self.text()}")

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Returns when the condition holds; fails when the launch ends first."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.02)

    def poll(self) -> int | None:
        """The exit code, once it has ended."""
        return self.process.poll()

    def end(self, timeout: float = 120) -> int:
        """Waits for the exit code; kills everything when it does not come in time."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                process.kill()
            raise

    def text(self) -> str:
        """What was printed so far."""
        self.output.seek(0)
        return self.output.read()


def single(*words: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m WORDS`: one rank, no launcher; with further environment variables."""
    command = [sys.executable, "-m", *words]
    env = environment() | variables
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
