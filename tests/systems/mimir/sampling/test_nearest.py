"""The nearest training peptide, compared with the textbook's recursion for the edit distance."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.systems.mimir.sampling import nearest as module
from pipeline.systems.mimir.sampling.nearest import nearest

PEPTIDES = st.lists(st.text("ACDK", min_size=1, max_size=7), min_size=1, max_size=12)


@lru_cache(maxsize=100_000)
def distance(a: str, b: str) -> int:
    """Levenshtein's."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


@settings(max_examples=60, deadline=None)
@given(PEPTIDES, PEPTIDES, st.integers(1, 40))
def test_it_is_the_first_of_those_with_the_fewest_edits(peptides: list[str], known: list[str], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        edits, index = nearest(peptides, known)
    for peptide, found, place in zip(peptides, edits, index, strict=True):
        every = [distance(peptide, other) for other in known]
        assert found == min(every) and place == every.index(min(every))
