"""PASS and FAIL of the guide's criteria."""

from __future__ import annotations

import math

import pytest

from pipeline.evaluation_result import Table
from pipeline.systems.cvfp.evaluation.criteria import CRITERIA, FAIL, GUIDE, PASS, criteria_table, lines, verdict

MET = {
    "effective_rank/train_all": 0.9, "effective_rank/gaussian_train_all": 0.995, "tokens/train": 99_968.0,
    "effective_rank/tokens": 11_136.0, "effective_rank/val": 0.8, "effective_rank/random_init_val": 0.7,
    "effective_rank/published_init_val": 0.86, "effective_rank/gaussian": 0.99, "final_diff": 9e-4,
    "final_diff_relative": 3e-5, "final_diff/random_init": 33.2, "identity_cosine": 0.3, "norm": 27.7, "spread": 20.0,
    "converged": 0.97, "probe/ratio": 2.5,
}  # fmt: skip
FAILED = {
    "effective_rank/train_all": 0.85, "effective_rank/val": 0.75, "final_diff": 1e-3, "final_diff_relative": 1e-3,
    "identity_cosine": 0.96, "norm": 0.05, "spread": 0.1, "converged": 0.94, "probe/ratio": 1.9,
}  # fmt: skip


def test_every_criterion_passes_where_it_is_met() -> None:
    table = criteria_table(MET, peak_bytes=1.5e9)
    assert len(table) == len(CRITERIA) + 1 and results(table) == {PASS}
    assert verdict(table) == f"criteria: {len(table)} PASS, 0 FAIL"
    rows = {row["criterion"]: row for row in table}
    val = rows["effective rank / width, validation"]
    assert val["value"] == 0.8 and val["wanted"] == "> 0.75" and val["of"] == GUIDE
    assert (val["random_init"], val["published_init"], val["gaussian"]) == (0.7, 0.86, 0.99)
    assert rows["final_diff"]["random_init"] == 33.2 and rows["final_diff"]["published_init"] is None
    assert rows["completes in memory, peak GB"]["value"] == 1.5
    assert rows["effective rank, validation, above untrained"]["wanted"] == "> 0.7"


def results(table: Table) -> set[object]:
    return {row["result"] for row in table}


@pytest.mark.parametrize("name", FAILED)
def test_each_fails_at_its_limit_and_beyond(name: str) -> None:
    table = criteria_table({**MET, name: FAILED[name]})
    mine = [one.name for one in CRITERIA if one.scalar == name]
    failed = [row["criterion"] for row in table if row["result"] == FAIL]
    assert failed and set(failed) <= set(mine)
    assert verdict(table).endswith(f"{len(failed)} FAIL ({', '.join(map(str, failed))})")
    # What is no number is not met either.
    assert FAIL in results(criteria_table({**MET, name: math.nan}))


def test_a_trained_rank_below_the_untrained_one_fails() -> None:
    table = criteria_table({**MET, "effective_rank/random_init_val": 0.81})
    assert [row["criterion"] for row in table if row["result"] == "FAIL"] == [
        "effective rank, validation, above untrained"
    ]


def test_the_runs_own_share_of_converged_tokens_is_asked_for() -> None:
    assert results(criteria_table(MET, converged=0.98)) == {PASS, FAIL}


def test_so_few_tokens_that_nothing_has_such_a_rank_decide_nothing() -> None:
    """At the guide's 10K tokens a dozen documents are held out: independent numbers have no more than 87 %."""
    few = {**MET, "effective_rank/gaussian_train_all": 0.849, "tokens/train": 1_100.0, "effective_rank/train_all": 0.8}
    rows = {row["criterion"]: row for row in criteria_table(few)}
    assert rows["effective rank / width, training"]["result"] == "not decidable at 1,100 tokens (Gaussian 84.9%)"
    assert rows["effective rank / width, validation"]["result"] == PASS
    assert verdict(criteria_table(few)) == f"criteria: {len(CRITERIA) - 1} PASS, 0 FAIL, 1 not decidable"
    above = {row["criterion"]: row for row in criteria_table({**few, "effective_rank/gaussian_train_all": 0.851})}
    assert above["effective rank / width, training"]["result"] == FAIL


def test_the_rank_of_training_tokens_is_that_of_all_of_them() -> None:
    """Of as many as are held out it says what the validation's does."""
    (row, *_) = criteria_table({**MET, "effective_rank/train": 0.1, "effective_rank/random_init_train_all": 0.95})
    assert (row["value"], row["random_init"], row["gaussian"], row["result"]) == (0.9, 0.95, 0.995, PASS)


def test_what_was_not_measured_is_no_row() -> None:
    table = criteria_table({"norm": 27.7})
    assert [row["criterion"] for row in table] == ["mean norm"]
    assert criteria_table({}) == [] and lines([]) == [""]


def test_lines_are_a_table() -> None:
    text = lines(criteria_table(MET, peak_bytes=1.5e9))
    assert text[0].split()[:4] == ["criterion", "value", "wanted", "result"] and len(text) == len(CRITERIA) + 2
    assert all("PASS" in line for line in text[1:])
    assert "random init" in text[0] and "0.7" in text[3] and "-" in text[1]
