"""Pairs within a few edits, and clusters of them, against comparing each with each."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from pipeline.systems.mimir.data import near
from pipeline.systems.mimir.data.clusters import greedy_clusters, radius
from pipeline.systems.mimir.data.encode import Words, words_of
from pipeline.systems.mimir.data.near import is_near, near_pairs

TEXTS = st.lists(st.text("ACD", min_size=1, max_size=11), min_size=1, max_size=40, unique=True)


def words(texts: list[str]) -> Words:
    return words_of(pa.array(texts, pa.string()))


def all_edits(texts: list[str], others: list[str]) -> np.ndarray:
    return process.cdist(texts, others, scorer=Levenshtein.distance, dtype=np.int64)


def check(texts: list[str], others: list[str], distance: int) -> None:
    edits = all_edits(texts, texts)
    first, second, found = near_pairs(words(texts), distance)
    expected = np.argwhere(np.triu(edits <= distance, 1))
    assert np.stack([first, second], 1).tolist() == expected.tolist()
    assert found.tolist() == edits[first, second].tolist()
    near = is_near(words(texts), words(others), distance)
    assert near.tolist() == (all_edits(texts, others) <= distance).any(1).tolist()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(TEXTS, TEXTS, st.sampled_from([1, 2]))
def test_what_is_near_is_what_comparing_each_with_each_finds(
    texts: list[str], others: list[str], distance: int
) -> None:
    check(texts, others, distance)


def random_texts(count: int, low: int, high: int, letters: str = "ACDEFGHIKL") -> list[str]:
    """Some of them a few edits from another."""
    generator = np.random.default_rng(count + low)
    texts = ["".join(generator.choice(list(letters), generator.integers(low, high + 1))) for _ in range(count)]
    for place in range(0, count - 1, 2):
        other = list(texts[place])
        for _ in range(generator.integers(1, 4)):
            other[generator.integers(len(other))] = str(generator.choice(list(letters)))
        texts[place + 1] = "".join(other)[:high]
    return list(dict.fromkeys(texts))


def test_so_it_is_in_many_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "_BLOCK", 500)
    texts = random_texts(120, 4, 14)
    check(texts, texts[::7] + random_texts(40, 5, 12), 2)


def greedy_by_definition(texts: list[str]) -> list[str]:
    """The representative of each, one at a time."""
    heads: list[str] = []
    found = {}
    for text in sorted(texts, key=lambda text: (-len(text), text)):
        for head in heads:
            if Levenshtein.distance(text, head) <= radius(np.array(min(len(text), len(head)))):
                found[text] = head
                break
        else:
            heads.append(text)
            found[text] = text
    return [found[text] for text in texts]


@pytest.mark.parametrize("lengths", [(4, 12), (6, 20), (25, 50)])
def test_clusters_are_those_of_the_greedy_rule(lengths: tuple[int, int]) -> None:
    texts = random_texts(120, *lengths, letters="ACDE")
    found = greedy_clusters(words(texts))
    assert [texts[place] for place in found] == greedy_by_definition(texts)
    assert len(set(found.tolist())) < len(texts)


def test_no_sequence_has_no_cluster() -> None:
    empty = words(["AAAA"])[np.empty(0, np.int64)]
    assert greedy_clusters(empty).tolist() == []
    assert is_near(words(["AAAA"]), empty, 2).tolist() == [False]
