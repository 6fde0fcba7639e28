"""The claims of both phases, of 100K tokens at width 768 (`make accept NAME=cvfp`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.restore import read_progress
from tests.accept import KEPT
from tests.systems.cvfp.experiment import Runs, Sizes, chosen, contexts, rows

Record = Callable[[str, Any], None]
FULL = Sizes()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    kept = os.environ.get(KEPT)
    return Runs(Path(kept) if kept else tmp_path_factory.mktemp("runs"), FULL)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def short(value: float) -> str:
    return f"{value:.3g}"


def by_iteration(held_out: list[dict[str, Any]], scalar: str) -> str:
    return ", ".join(percent(row[scalar]) for row in held_out)


UNTRAINED = {"untrained": "random_init", "published init": "published_init"}


def beside(found: dict[str, float], scalar: str, *, gaussian: bool = True, shown: Callable[[float], str]) -> str:
    """A figure, and those of the baselines by the same rule."""
    names = {**UNTRAINED, **({"Gaussian": "gaussian"} if gaussian else {})}
    others = ", ".join(f"{words} {shown(found[f'{scalar}/{name}'])}" for words, name in names.items())
    return f"{shown(found[scalar])} ({others})"


def rank(found: dict[str, float], data: str, gaussian: str) -> str:
    names = {**{words: f"{name}_{data}" for words, name in UNTRAINED.items()}, "Gaussian": gaussian}
    others = ", ".join(f"{words} {percent(found[f'effective_rank/{name}'])}" for words, name in names.items())
    return f"{percent(found[f'effective_rank/{data}'])} of the width ({others})"


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_contexts_converge_and_keep_their_rank_and_what_was_read(runs: Runs, record_property: Record) -> None:
    run = runs.first_phase()
    held_out, training = rows(run, "val"), rows(run, "train")
    found, ended = contexts(run), read_progress(chosen(run))
    tokens = int(found["effective_rank/tokens"])
    for name, value in {
        "training tokens": int(found["tokens/train"]),
        "held-out tokens": int(found["tokens/val"]),
        "iterations": f"{training[-1]['epoch']:.3g} of at most {FULL.iterations}",
        "converged before the first and after each iteration": by_iteration(held_out, "converged"),
        "the same, held out": by_iteration(held_out, "converged_val"),
        "effective rank, held out, the same": by_iteration(held_out, "effective_rank/val"),
        "converged": beside(found, "converged", shown=percent),
        "converged, held out": beside(found, "converged_val", shown=percent),
        "final_diff": beside(found, "final_diff", shown=short),
        "final_diff / norm": beside(found, "final_diff_relative", shown=short),
        "probe, context / embedding": beside(found, "probe/ratio", gaussian=False, shown=short),
        "probe, context": beside(found, "probe/context", gaussian=False, shown=percent),
        "tokens of each rank": tokens,
        "effective rank, training": rank(found, "train", "gaussian"),
        "effective rank, held out": rank(found, "val", "gaussian"),
        "effective rank, all training tokens": rank(found, "train_all", "gaussian_train_all"),
        "minutes of the first phase": round(training[-1]["elapsed"] / 60, 1),
    }.items():
        record_property(name, value)
        print(f"{name}: {value}")
    # By its own rule, not by the number of iterations.
    assert ended.phase == "fixed_point" and ended.rule_met
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
    found = contexts(learnt, "--control", str(chosen(control)))
    record_property("held-out labels", int(found["prediction/labels"]))
    record_property("perplexity", f"{found['prediction/ppl_model']:.1f}")
    for name in ("control", "context_zero", "unigram"):
        ratio, low, high = (found[f"prediction/ratio_{name}{end}"] for end in ("", "_low", "_high"))
        record_property(
            f"perplexity, {name.replace('_', ' ')}",
            f"{found[f'prediction/ppl_{name}']:.1f} ({ratio:.3f} times; {low:.3f} to {high:.3f})",
        )
    names = {"model": "", "control": "control ", "context_zero": "context zero ", "unigram": "unigram "}
    accuracies = [f"{words}{percent(found[f'prediction/accuracy_{name}'])}" for name, words in names.items()]
    record_property("accuracy", f"{accuracies[0]} ({', '.join(accuracies[1:])})")
    record_property("minutes of the second phase", round(rows(learnt, "train")[-1]["elapsed"] / 60, 1))
    # At least 10 % below the control's, and below the unigram model's.
    assert found["prediction/ppl_model"] <= 0.9 * found["prediction/ppl_control"]
    assert found["prediction/ratio_control_low"] > 1
    assert found["prediction/ratio_unigram"] > 1
