"""A bench in this process: what it measures runs in processes of its own, which need no further one around them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from pipeline.cli import main
from tests.launch.harness import ROOT, environment


@pytest.fixture
def bench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`mnemos bench WORDS` and what it printed."""
    monkeypatch.chdir(ROOT)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        code = main(["bench", *words])
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    return run
