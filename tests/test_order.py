"""The order in which files of tests run."""

from __future__ import annotations

from tests.conftest import LONGEST, TESTS, longest_first


def test_the_longest_files_are_there() -> None:
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []


def test_the_longest_come_first_then_those_of_many_tests() -> None:
    first, second = LONGEST[:2]
    names = ["few.py", "many.py", "many.py", second, first, first]
    assert longest_first([TESTS / name for name in names]) == [4, 5, 3, 1, 2, 0]
