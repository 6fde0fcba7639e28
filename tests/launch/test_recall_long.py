"""A model trained on distances of up to 1K tokens is asked after up to a million, through the carry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.lm.binomial import wilson
from pipeline.lm.long_recall import DISTANCES
from tests.launch.harness import single


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_eight_pairs_are_recalled_after_a_million_tokens(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    words = ("miras_recall_long", "--output-dir", str(tmp_path), "--eval-every", "0")
    done = single("pipeline", "train", *words, timeout=3600)
    assert done.returncode == 0, done.stderr
    # Every large tensor is a mapping of its own, given back at once: otherwise the resident set grows with the holes
    # between tensors, by an eighth over a million tokens.
    words = ("eval", str(tmp_path), "--suite", "recall")
    done = single("pipeline", *words, timeout=3600, MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "evals").glob("*/recall/evaluation.json")
    scalars = json.loads(file.read_text())["scalars"]
    queries = scalars["queries"]
    for distance in DISTANCES:
        low, high = wilson(queries * scalars[f"recall/{distance}"], queries)
        share, off, emptied = (scalars[f"{mode}recall/{distance}"] for mode in ("", "memory_off/", "memory_emptied/"))
        record_property(
            f"recall at {distance}",
            f"{share:.3f} ({low:.3f} to {high:.3f}), memory off {off:.3f}, emptied {emptied:.3f}",
        )
        assert emptied <= 0.25
    capacity = {name: value for name, value in scalars.items() if name.startswith("capacity/")}
    record_property("pairs recalled at 1024", ", ".join(f"{n.partition('/')[2]}: {v:.3f}" for n, v in capacity.items()))
    growth = scalars["peak_memory/1048576"] / scalars["peak_memory/16384"]
    record_property("peak memory at 1M over that at 16K", f"{growth:.3f}")
    assert queries >= 96 and growth <= 1.05
    assert scalars["recall/65536"] >= 0.9
    assert scalars["recall/1048576"] >= 0.7
    for distance in DISTANCES:
        low, high = wilson(queries * scalars[f"memory_off/recall/{distance}"], queries)
        assert low <= 1 / 16 <= high, "chance"
