"""trainable.safetensors is written from memory: it has the bytes of the masters, rounded, for every stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.forked import forked


@pytest.mark.timeout(400)
def test_it_holds_the_masters_rounded_and_the_moving_averages_of_its_step(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{number} " * 60}) + "\n" for number in range(12)))
    done = forked(2, "tests.launch.trainable_main", str(tmp_path), str(data))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert len(found) == 17
    wrong = [(case, what) for case, facts in found.items() for what, holds in facts.items() if not holds]
    assert wrong == []
