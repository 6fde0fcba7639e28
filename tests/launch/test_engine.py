"""The engine on two data ranks: non-finite updates for every stage and precision, loss scales, weights of a folder."""

from __future__ import annotations

import json
from pathlib import Path

from tests.launch.harness import launch


def test_bad_updates_are_skipped_and_folders_are_loaded(tmp_path: Path) -> None:
    done = launch(2, "tests.launch.engine_main", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert len(found) == 12 + 3 + 5 + 4 + 3
    wrong = [(case, what) for case, facts in found.items() for what, holds in facts.items() if not holds]
    assert wrong == []
