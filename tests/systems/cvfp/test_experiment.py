"""The claims of both phases, of 100K tokens at width 768 (`make accept NAME=cvfp`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.accept import KEPT
from tests.systems.cvfp.experiment import Runs, Sizes, contexts, rows

Record = Callable[[str, Any], None]
FULL = Sizes()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    kept = os.environ.get(KEPT)
    return Runs(Path(kept) if kept else tmp_path_factory.mktemp("runs"), FULL)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_contexts_converge_and_keep_their_rank_and_what_was_read(runs: Runs, record_property: Record) -> None:
    run = runs.first_phase()
    held_out, training = rows(run, "val"), rows(run, "train")
    found = contexts(run)
    iterations = training[-1]["epoch"]
    record_property("iterations", f"{iterations:.3g}")
    record_property("converged by iteration", ", ".join(percent(row["converged"]) for row in held_out))
    for name, scalar, others in (
        ("converged", "converged", ("random_init", "published_init", "gaussian")),
        ("final_diff / norm", "final_diff_relative", ("random_init", "published_init", "gaussian")),
        ("probe, context / embedding", "probe/ratio", ("random_init", "published_init")),
    ):
        beside = ", ".join(f"{other.replace('_', ' ')} {found[f'{scalar}/{other}']:.3g}" for other in others)
        record_property(name, f"{found[scalar]:.3g} ({beside})")
    for side in ("train", "val"):
        beside = ", ".join(
            f"{words} {percent(found[f'effective_rank/{name}'])}"
            for words, name in (
                ("untrained", f"random_init_{side}"), ("published init", f"published_init_{side}"),
                ("Gaussian", "gaussian"),
            )
        )  # fmt: skip
        record_property(
            f"effective rank, {side}", f"{percent(found[f'effective_rank/{side}'])} of the width ({beside})"
        )
    record_property("tokens of each rank", int(found["effective_rank/tokens"]))
    record_property("minutes of the first phase", round(training[-1]["elapsed"] / 60, 1))
    assert iterations <= FULL.iterations
    assert found["converged"] >= 0.95
    assert found["final_diff_relative"] < 1e-3
    assert found["effective_rank/val"] > max(0.75, found["effective_rank/random_init_val"])
    assert found["probe/ratio"] >= 2


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_contexts_are_worth_a_tenth_of_the_perplexity(runs: Runs, record_property: Record) -> None:
    first = runs.first_phase()
    learnt = runs.second_phase("learnt", first)
    control = runs.second_phase("zero", first, "--model.prediction.context", "zero")
    best = (control / "checkpoints" / "best").exists()
    found = contexts(learnt, "--control", str(control / "checkpoints" / "best" if best else control))
    record_property("held-out labels", int(found["prediction/labels"]))
    record_property("perplexity", f"{found['prediction/ppl_model']:.1f}")
    for name in ("control", "context_zero", "unigram"):
        ratio, low, high = (found[f"prediction/ratio_{name}{end}"] for end in ("", "_low", "_high"))
        record_property(
            f"perplexity, {name.replace('_', ' ')}",
            f"{found[f'prediction/ppl_{name}']:.1f} ({ratio:.3f} times; {low:.3f} to {high:.3f})",
        )
    record_property("minutes of the second phase", round(rows(learnt, "train")[-1]["elapsed"] / 60, 1))
    # At least 10 % below the control's, and below the unigram model's.
    assert found["prediction/ppl_model"] <= 0.9 * found["prediction/ppl_control"]
    assert found["prediction/ratio_control_low"] > 1
    assert found["prediction/ratio_unigram"] > 1
