"""The scan over sequence ranks equals the scan of the whole sequence: values, state and gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.forked import forked

TOLERANCE = {"bfloat16": 1e-2}
TIGHT = 1e-5


@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_on_sequence_ranks_are_the_whole_scan(ranks: int, tmp_path: Path) -> None:
    done = forked(ranks, "tests.launch.scan_main", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert len(found) == 15
    for case, facts in found.items():
        errors = [value for value in facts.values() if not isinstance(value, bool)]
        print(f"{case}: largest error {max(errors, default=0.0):.1e}")
    wrong = [
        (case, what, value)
        for case, facts in found.items()
        for what, value in facts.items()
        if (value is False if isinstance(value, bool) else not value <= TOLERANCE.get(case, TIGHT))
    ]
    assert wrong == []
