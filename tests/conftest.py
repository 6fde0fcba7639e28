"""What every test runs under."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import settings

from pipeline.host.hardware import choose_accelerator
from tests.unsynced import leave_files_to_the_cache

TESTS = Path(__file__).parent

choose_accelerator()
leave_files_to_the_cache()

# How long an example takes is the machine's affair, which may be doing something else.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Shells start background jobs, and nohup what follows it, with these ignored; what a test starts would inherit that.
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)

LONGEST = (
    "launch/test_parity.py",
    "launch/test_recall.py",
    "launch/test_kill.py",
    "launch/test_phases.py",
    "launch/test_train.py",
    "launch/test_resume.py",
    "launch/test_nodes.py",
    "launch/test_notebooks.py",
    "launch/test_elastic.py",
    "launch/test_stop.py",
    "test_docs_commands.py",
    "systems/neuromorphic/test_experiment.py",
    "bench/test_kernels.py",
    "bench/test_throughput.py",
    "bench/test_resume.py",
)
"""Files of tests/ that take about a minute, or less with few tests, so that they would start last by their number: one
process would be busy with them while the others have nothing left."""


def longest_first(paths: Sequence[Path]) -> list[int]:
    """The order of tests by their files: the longest, then those of many tests; what is in a file keeps its order."""
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    counts = Counter(paths)
    return sorted(range(len(paths)), key=lambda i: (places.get(paths[i], len(places)), -counts[paths[i]]))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [items[i] for i in longest_first([item.path for item in items])]
