"""Wilson's interval holds the true share as often as it says, and has a width where all answers are right."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.lm.binomial import Z, wilson


@given(st.integers(1, 2000), st.floats(0, 1))
def test_the_ends_are_the_shares_that_the_count_just_does_not_refute(count: int, share: float) -> None:
    """The definition: |found - p| = z sqrt(p (1 - p) / n) at both ends."""
    right = round(count * share)
    low, high = wilson(right, count)
    assert 0 <= low <= right / count <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(right / count - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / count), rel=1e-6, abs=1e-9)


def test_all_right_and_none_asked() -> None:
    low, high = wilson(96, 96)
    assert 0.96 < low < 0.97 and high == 1
    assert all(map(math.isnan, wilson(0, 0)))
