"""A process that frees its tensors and takes as many again pays for their memory once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from pipeline.host.freed_memory import OURS

PROGRAM = """
from pipeline.cli import main
main(["--version"])
import resource, torch

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(2**18) for _ in range(200)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print("faults", [step() for _ in range(4)][-1])
"""


def faults(**environment: str) -> int:
    """Page faults of taking 200 MB that have been freed."""
    words = [sys.executable, "-c", PROGRAM]
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, env=kept | environment)
    return int(done.stdout.split("faults")[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_taken_again_without_faults_unless_the_environment_says_no() -> None:
    pages = 200 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert faults() < pages / 20
    assert faults(MALLOC_TRIM_THRESHOLD_="131072") > pages / 2
