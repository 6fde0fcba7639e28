"""The memory works: it answers what attention cannot reach, and without it the same weights cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.callbacks.metrics import read_rows
from pipeline.recipes.miras import miras_recall
from pipeline.systems.miras.config import MirasConfig
from tests.launch.harness import single


def test_every_gap_is_beyond_the_reach_of_attention() -> None:
    model = miras_recall().model
    assert isinstance(model, MirasConfig) and model.recall is not None
    assert model.attention.kind == "window" and model.attention.window == 32 and model.attention.sinks == 0
    assert model.recall.min_gap > model.backbone.layers * (model.attention.window - 1)
    assert model.recall.max_gap == 240


@pytest.mark.parametrize("recipe", ["miras_recall", "miras_recall_delta"])
def test_the_memory_recalls_what_attention_cannot_reach(recipe: str, tmp_path: Path) -> None:
    done = single("pipeline", "train", recipe, "--output-dir", str(tmp_path), "--eval-every", "0", timeout=600)
    assert done.returncode == 0, done.stderr
    last = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["mode"] == "val"][-1]
    assert last["recall"] >= 0.95
    assert last["memory_off/recall"] <= 0.25
    curve = json.loads((tmp_path / "plots" / "recall_by_distance.json").read_text())
    assert min(value for value in curve["series"]["memory on"] if value is not None) >= 0.9
