"""Large tensors of a command lie in large pages, where Linux gives them to who asks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.host.large_pages import VARIABLE, use_large_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MEGABYTES = 256
PROGRAM = f"""
from pipeline.cli import main
main(["--version"])
import torch
x = torch.zeros({MEGABYTES} * 2**18)
print(open("/proc/self/smaps_rollup").read())
"""


def huge_pages(**environment: str) -> float:
    """Megabytes of a process with a large tensor that are in large pages."""
    words = [sys.executable, "-c", PROGRAM]
    kept = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, env=kept | environment)
    found = re.search(r"AnonHugePages:\s*(\d+) kB", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]) / 1024


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(), reason="Linux does not ask programs for their wish"
)
def test_a_large_tensor_is_in_large_pages_unless_the_environment_says_no() -> None:
    assert huge_pages() > 0.9 * MEGABYTES
    assert huge_pages(**{VARIABLE: "0"}) < 0.1 * MEGABYTES


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    use_large_pages()
    assert os.environ[VARIABLE] == "0"
    monkeypatch.delenv(VARIABLE)
    use_large_pages()
    assert os.environ[VARIABLE] == "1"
