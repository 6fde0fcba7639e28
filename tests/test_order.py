"""The order in which files of tests run."""

from __future__ import annotations

from tests.conftest import LONGEST, TESTS, pytest_collection_modifyitems


def test_the_longest_files_are_there() -> None:
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []


class Item:
    def __init__(self, name: str, number: int) -> None:
        self.path, self.number = TESTS / name, number


def test_the_longest_come_first_then_those_of_many_tests() -> None:
    first, second = LONGEST[:2]
    names = ["few.py", "many.py", "many.py", second, first, first]
    items = [Item(name, number) for number, name in enumerate(names)]
    pytest_collection_modifyitems(items)  # type: ignore[arg-type]
    assert [item.number for item in items] == [4, 5, 3, 1, 2, 0]
