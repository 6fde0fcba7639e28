"""How fast a step of tier b in phase B is on two threads (`make accept NAME=neuromorphic_speed`)."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.costs import flops
from tests.launch.harness import single

THREADS = "2"
ROWS, TOKENS = 4, 256
PROTOTYPE, PROTOTYPE_PRODUCTS = 35.0, 290.0
"""Tokens/s of the prototype, measured on an idle machine at so many GFLOP/s of float32 matrix products."""


def measured(folder: Path, dtype: str, rows: int, tokens: int) -> dict[str, Any]:
    result = folder / "result.json"
    words = ("tests.systems.neuromorphic.speed_main", dtype, str(rows), str(tokens), str(result))
    done = single(*words, timeout=900, OMP_NUM_THREADS=THREADS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    found = json.loads(result.read_text())
    # Of each step but the first, which fills caches, beside the products before and after it.
    pairs = zip(found["products"][1:], found["products"][2:], strict=False)
    found["per product"] = statistics.median(
        rows * tokens / seconds / ((before + after) / 2)
        for seconds, (before, after) in zip(found["seconds"][1:], pairs, strict=True)
    )
    found["tokens/s"] = rows * tokens / statistics.median(found["seconds"][1:])
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_step_is_near_its_matrix_products_and_far_from_the_prototype(tmp_path: Path, record_property: Any) -> None:
    wide = measured(tmp_path, "float32", ROWS, TOKENS)
    narrow = measured(tmp_path, "bfloat16", ROWS, TOKENS)
    few, many = (measured(tmp_path, "bfloat16", rows, 64) for rows in (4, 16))
    gigaflop = flops(NeuromorphicConfig(tier="b"), "B").total / 1e9
    share = wide["per product"] * gigaflop
    # By the rate of products: what the tokens/s would be on the machine of the prototype's measurement.
    times = narrow["per product"] * PROTOTYPE_PRODUCTS / PROTOTYPE
    for name, value in {
        "GFLOP a token": f"{gigaflop:.3f}",
        "float32 GFLOP/s of products": f"{statistics.median(wide['products']):.0f}",
        "float32 tokens/s": f"{wide['tokens/s']:.0f}",
        "float32 share of the products' rate": f"{share:.3f}",
        "bfloat16 tokens/s": f"{narrow['tokens/s']:.0f}",
        "bfloat16 times the prototype, at the same rate of products": f"{times:.1f}",
        "peak memory with AdamW, GB": f"float32 {wide['peak'] / 1e9:.2f}, bfloat16 {narrow['peak'] / 1e9:.2f}",
        "time of a token in 16 rows to that in 4": f"{few['per product'] / many['per product']:.2f}",
        "threads": wide["threads"],
    }.items():
        record_property(name, value)
        print(f"{name}: {value}")
    assert wide["threads"] == 2
    assert all(loss == loss for run in (wide, narrow) for loss in run["loss"])
    assert share >= 0.3
    assert times >= 8
    assert max(wide["peak"], narrow["peak"]) <= 5e9
    assert many["per product"] >= 0.9 * few["per product"]
