"""Counts and sizes in a few digits and a unit."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.units import human_bytes, human_count


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (12.34, "12.3"), (999, "999"), (1000, "1K"), (1234, "1.23K"), (45_600, "45.6K"), (1_234_567, "1.23M"),
     (2.5e9, "2.5G"), (7e12, "7T")],
)  # fmt: skip
def test_counts(value: float, text: str) -> None:
    assert human_count(value) == text


@given(st.floats(1, 9e14))
@example(999.9)
def test_a_count_is_three_digits_and_a_unit_and_no_power_of_ten(value: float) -> None:
    text = human_count(value)
    number = text.rstrip("KMGT")
    scale = 1000 ** " KMGT".index(text.removeprefix(number) or " ")
    assert "e" not in text
    assert float(number) * scale == pytest.approx(value, rel=0.006)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * 2**30, "3.0 GiB"), (2**51, "2048.0 TiB")]
)
def test_sizes(size: int, text: str) -> None:
    assert human_bytes(size) == text
