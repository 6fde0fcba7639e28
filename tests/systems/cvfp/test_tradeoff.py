"""What the weight of diversity costs in convergence, of a small model (`make accept NAME=cvfp_tradeoff`).

The loss is (1 - w) D + w V, of the distance D to the pass before and the diversity term V. Of two weights, the
minimisers c and c' have (1 - w) D(c) + w V(c) <= (1 - w) D(c') + w V(c') and the other way round with w'; added up,
(w' - w) (V(c') - V(c)) <= (w' - w) (D(c') - D(c)), and with either of them, more weight ends at no larger V and no
smaller D. A run of some passes is no minimiser: without any distance (w = 1) the updates carry V beyond its least. So
of V it is asked that any weight of it lowers it, of D that it never falls by more than `SLACK`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.callbacks.metrics import read_rows
from pipeline.callbacks.plots import draw_curve
from pipeline.evaluation_result import Curve
from tests.accept import KEPT
from tests.launch.forked import forked

WEIGHTS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
PASSES, WIDTH, LAYERS = 10, 64, 3
STD = 0.07
"""Of the first weights: that of 0.02 at width 768, by the root of the width."""
LEARNING_RATE = 0.003
SLACK = 0.05
FLAGS = (
    "--context-dim", str(WIDTH), "--num-layers", str(LAYERS), "--model.initial-std", str(STD),
    "--max-iterations", str(PASSES), "--phase1-learning-rate", str(LEARNING_RATE), "--phases", "fixed_point",
    # All passes, whatever has converged: weights are compared after as many updates.
    "--epochs.evaluate", str(PASSES), "--phase1-min-converged-ratio", "1.0", "--epochs.save", "0", "--keep", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get(KEPT)
    return Path(kept) if kept else tmp_path_factory.mktemp("tradeoff")


def measured(folder: Path, weight: float) -> dict[str, float]:
    """The held-out numbers after the last pass of a run, and both terms of the loss in it."""
    run = folder / f"weight-{weight}"
    words = ("--dist-reg-weight", str(weight), "--cache-dir", str(folder / "cache"), "--output-dir", str(run))
    done = forked(1, "pipeline", "train", "cvfp_tiny", *FLAGS, *words, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    rows = read_rows(run / "metrics.jsonl")
    training, held_out = ([row for row in rows if row["mode"] == mode] for mode in ("train", "val"))
    steps = training[-1]["step"]
    last = [row for row in training if row["step"] > steps * (PASSES - 1) / PASSES]
    terms = {name: sum(row[name] for row in last) / len(last) for name in ("distance", "diversity/log_det")}
    assert held_out[-1]["step"] == steps
    return {**held_out[-1], **terms, "passes": training[-1]["epoch"]}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_diversity_is_paid_for_with_convergence(folder: Path, record_property: Callable[[str, Any], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = {weight: measured(folder, weight) for weight in WEIGHTS}
    any_of = found[0.0]
    baselines = {
        "untrained": (any_of["converged_val/random_init"], any_of["effective_rank/random_init_val"]),
        "published init": (None, any_of["effective_rank/published_init_val"]),
        "Gaussian": (None, any_of["effective_rank/gaussian"]),
    }
    table = [
        "| weight | converged, held out | distance of two starts | effective rank, held out | distance | diversity |",
        "|---|---|---|---|---|---|",
    ]
    for weight, row in found.items():
        numbers = ("start_distance_val", "effective_rank/val", "distance", "diversity/log_det")
        converged, (start, rank, distance, diversity) = row["converged_val"], (row[name] for name in numbers)
        table.append(f"| {weight} | {converged:.1%} | {start:.3g} | {rank:.1%} | {distance:.3g} | {diversity:.3g} |")
    for name, (share, rank) in baselines.items():
        table.append(f"| {name} | {'-' if share is None else f'{share:.1%}'} | - | {rank:.1%} | - | - |")
    print("\n".join(table))
    record_property("table", json.dumps(table))
    draw_curve(picture(found, baselines), folder / "tradeoff.png", f"width {WIDTH}, {LAYERS} blocks, {PASSES} passes")
    assert (folder / "tradeoff.png").stat().st_size > 10_000
    assert all(row["passes"] == PASSES for row in found.values())
    for (_, less), (_, more) in pairwise(found.items()):
        assert more["distance"] >= less["distance"] * (1 - SLACK)
    first, last = found[WEIGHTS[0]], found[WEIGHTS[-1]]
    for weight in WEIGHTS[1:]:
        assert found[weight]["diversity/log_det"] < first["diversity/log_det"]
        assert found[weight]["effective_rank/val"] > first["effective_rank/val"]
    assert last["distance"] > first["distance"]


def picture(found: dict[float, dict[str, float]], baselines: dict[str, tuple[float | None, float]]) -> Curve:
    names = {"converged": "converged_val", "effective rank": "effective_rank/val"}
    levels = {f"effective rank, {name}": rank for name, (_, rank) in baselines.items()}
    levels |= {f"converged, {name}": converged for name, (converged, _) in baselines.items() if converged is not None}
    return Curve(
        "Convergence and effective rank of held-out contexts", "weight of the diversity term", "share",
        tuple(found), {name: tuple(row[key] for row in found.values()) for name, key in names.items()}, levels=levels,
    )  # fmt: skip
