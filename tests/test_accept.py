"""`make accept` lists long experiments and runs one: its figures, its outcome, a line for the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.host.provenance import ROOT
from tests import accept
from tests.accept import EXPERIMENTS, Experiment

TEST = """
import os
from pathlib import Path

import pytest

@pytest.mark.slow
def test_measures(record_property):
    record_property("gap closed", 0.25)
    kept = Path(os.environ["ACCEPT_KEPT"])
    record_property("runs kept before", sum(1 for _ in kept.iterdir()) if kept.exists() else 0)
    kept.mkdir(exist_ok=True)
    (kept / "run").touch()
    assert {holds}

def test_is_not_slow():
    raise AssertionError("never chosen")
"""


def test_it_lists_and_refuses_names_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert accept.main([]) == 0
    assert all(name in capsys.readouterr().out for name in ("kills",))
    assert accept.main(["kill"]) == 2
    assert "kills" in capsys.readouterr().err


def test_every_experiment_is_a_slow_test() -> None:
    for experiment in EXPERIMENTS.values():
        for path in experiment.tests:
            text = (ROOT / path).read_text()
            assert "@pytest.mark.slow" in text and "record_property" in text
            assert all(word in text for word in experiment.keywords.split())


@pytest.mark.parametrize("holds", [True, False])
def test_an_experiment_leaves_a_file_and_a_line(
    holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "test_it.py"
    test.write_text(TEST.format(holds=holds))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert accept.main(["gap"], {"gap": Experiment("it remembers", (str(test),), 1)}) == (0 if holds else 1)
    written = json.loads((tmp_path / "out" / "gap.json").read_text())
    assert written["accepted"] is holds and written["figures"] == {"gap closed": "0.25", "runs kept before": "0"}
    assert written["machine"]["device"]["kind"] and written["versions"]["torch"]
    outcome = "accepted" if holds else "not accepted"
    assert f"| it remembers | {outcome} | gap closed 0.25; runs kept before 0 | 0." in capfd.readouterr().out
    # Started again, it finds what the first time left.
    accept.main(["gap"], {"gap": Experiment("it remembers", (str(test),), 1)})
    assert json.loads((tmp_path / "out" / "gap.json").read_text())["figures"]["runs kept before"] == "1"
