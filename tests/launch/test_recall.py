"""The memory works: it answers what attention cannot reach, and without it the same weights cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.callbacks.metrics import read_rows
from pipeline.recipes import all_recipes
from pipeline.recipes.miras import miras_recall
from pipeline.systems.miras.config import MirasConfig
from tests.launch.forked import forked

FAMILY = {
    "miras_recall_moneta": 0.8,
    "miras_recall_yaad": 0.9,
    "miras_recall_memora": 0.95,
    "miras_recall_mlp": 0.9,
    "miras_recall_swiglu": 0.85,
}
"""The least recall of recipes that take the rules which are not exact."""


def test_every_gap_is_beyond_the_reach_of_attention() -> None:
    recipes = [recipe for name, recipe in all_recipes().items() if name.startswith("miras_recall")]
    assert len(recipes) == 8
    for recipe in recipes:
        model, task = recipe().model, recipe().data.recall
        assert isinstance(model, MirasConfig) and task is not None
        assert model.attention.kind == "window" and model.attention.window == 32 and model.attention.sinks == 0
        assert task.min_gap > model.backbone.layers * (model.attention.window - 1)
        largest = {"miras_recall_moneta": 110, "miras_recall_long": 1024}
        assert task.max_gap == largest.get(recipe().recipe, 240)


def test_pairs_and_queries_lie_in_different_chunks() -> None:
    """A large chunk is read before it is written: what is asked for in a pair's own chunk, no memory knows."""
    model, task = miras_recall().model, miras_recall().data.recall
    assert isinstance(model, MirasConfig) and task is not None
    assert model.memory.swiglu.gradient_chunk <= task.min_gap


def trained(recipe: str, folder: Path, timeout: float) -> dict[str, Any]:
    """The held-out row after a run of the recipe."""
    words = ["train", recipe, "--output-dir", str(folder), "--eval-every", "0"]
    done = forked(1, "pipeline", *words, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return [row for row in read_rows(folder / "metrics.jsonl") if row["mode"] == "val"][-1]


@pytest.mark.parametrize("recipe", ["miras_recall", pytest.param("miras_recall_delta", marks=pytest.mark.slow)])
def test_the_memory_recalls_what_attention_cannot_reach(recipe: str, tmp_path: Path) -> None:
    last = trained(recipe, tmp_path, 600)
    assert last["recall"] >= 0.95
    assert last["memory_off/recall"] <= 0.25
    assert last["memory_emptied/recall"] <= 0.25
    curve = json.loads((tmp_path / "plots" / "recall_by_distance.json").read_text())
    assert min(value for value in curve["series"]["memory on"] if value is not None) >= 0.9


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("recipe", FAMILY)
def test_the_family_recalls_too(recipe: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Minutes each; tests/systems/miras/test_rules.py has a regression of seconds for every rule."""
    last = trained(recipe, tmp_path, 7000)
    off, emptied = last["memory_off/recall"], last["memory_emptied/recall"]
    record_property(recipe, f"{last['recall']:.3f}, memory off {off:.3f}, emptied {emptied:.3f}")
    assert last["recall"] >= FAMILY[recipe]
    assert off <= 0.25
    assert emptied <= 0.25
