"""The hold-out: no document and no tokens on both sides, and the same side whatever else there is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.systems.cvfp.data.split import split, without
from pipeline.systems.cvfp.data.texts import Cut

rows = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=3), min_size=2, max_size=40)


def cut(values: list[list[int]], owners: list[int] | None = None) -> Cut:
    return Cut([np.array(value, np.uint32) for value in values], owners or list(range(len(values))))


def as_lists(found: list[np.ndarray]) -> list[list[int]]:
    return [row.tolist() for row in found]


@given(rows, st.floats(0.05, 0.5))
def test_equal_rows_are_on_one_side(values: list[list[int]], holdout: float) -> None:
    # With this one, whose hash is above any of those shares, there is always one to train on.
    values = [*values, [10, 10]]
    training, held_out = map(as_lists, split(cut(values), holdout, "rows"))
    assert held_out and training and sorted(training + held_out) == sorted(values)
    assert not {tuple(row) for row in training} & {tuple(row) for row in held_out}


def test_a_document_keeps_its_side_when_others_come() -> None:
    values = [[index, index + 1] for index in range(400)]
    few, many = (split(cut(values[:count]), 0.2, "rows")[1] for count in (100, 400))
    assert as_lists(few) == [row for row in as_lists(many) if row[0] < 100]
    assert 0.14 < len(many) / 400 < 0.26


def test_pieces_of_a_document_stay_together() -> None:
    values = [[index, 0] for index in range(60)]
    owners = [index // 3 for index in range(60)]
    training, held_out = split(cut(values, owners), 0.3, "rows")
    assert len(held_out) % 3 == 0
    assert not {row[0] // 3 for row in training} & {row[0] // 3 for row in held_out}


def test_one_document_is_held_out_at_least() -> None:
    training, held_out = split(cut([[1, 2], [3, 4], [5, 6]]), 1e-9, "rows")
    assert (len(training), len(held_out)) == (2, 1)


def test_of_a_single_document_its_end_is_held_out() -> None:
    values = [[index, 0] for index in range(10)]
    training, held_out = split(cut(values, [0] * 10), 0.2, "rows")
    assert as_lists(training) == values[:8] and as_lists(held_out) == values[8:]
    assert [len(side) for side in split(cut(values[:2], [0, 0]), 0.9, "rows")] == [1, 1]


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UserError, match="1 rows of two tokens or more"):
        split(cut([[1, 2]]), 0.5, "rows")
    with pytest.raises(UserError, match="leaves no document to train on"):
        split(cut([[1, 2], [1, 2]]), 0.5, "rows")


def test_rows_that_are_held_out_are_left_out() -> None:
    kept = without(cut([[1, 2], [1, 2, 0], [3, 4]]).rows, cut([[1, 2], [4, 3]]).rows)
    assert as_lists(kept) == [[1, 2, 0], [3, 4]]
