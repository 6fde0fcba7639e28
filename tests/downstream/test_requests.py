"""Requests of many lengths become rows: every one once, cut at the front where a model reads no more."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.batch import IGNORED
from pipeline.downstream.requests import ROWS, Request, groups, removed, rows_of, width_of

REQUEST = st.builds(
    Request, st.lists(st.integers(0, 9), min_size=1, max_size=9), st.lists(st.integers(0, 9), min_size=1, max_size=5)
)


def test_the_last_token_is_predicted_and_not_read() -> None:
    request = Request([1, 2, 3], [4, 5])
    assert width_of(request, None) == width_of(request, 4) == 4 and removed(request, 4) == 0
    ids, labels = rows_of([request], None, 6, padding=0)
    assert ids.tolist() == [[1, 2, 3, 4, 0, 0]]
    assert labels.tolist() == [[IGNORED, IGNORED, 4, 5, IGNORED, IGNORED]]


def test_what_a_model_does_not_read_is_the_front() -> None:
    request = Request([1, 2, 3], [4, 5])
    assert removed(request, 2) == 2 and width_of(request, 2) == 2
    ids, labels = rows_of([request], 2, 2, padding=0)
    assert ids.tolist() == [[3, 4]] and labels.tolist() == [[4, 5]]


@given(st.lists(REQUEST, min_size=1, max_size=6), st.none() | st.integers(5, 12), st.integers(0, 4))
def test_every_label_follows_its_id(requests: list[Request], limit: int | None, more: int) -> None:
    width = max(width_of(request, limit) for request in requests) + more
    ids, labels = rows_of(requests, limit, width, padding=9)
    for row, request in enumerate(requests):
        places = (labels[row] != IGNORED).nonzero().flatten()
        assert labels[row, places].tolist() == request.continuation
        text = torch.tensor([*request.context, *request.continuation])
        read = text[removed(request, limit) :]
        assert ids[row, : len(read) - 1].tolist() == read[:-1].tolist()
        assert places.tolist() == list(range(len(read) - 1 - len(request.continuation), len(read) - 1))
        assert limit is None or len(read) - 1 <= limit


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(1, 200), st.integers(1, 4))
def test_groups_hold_every_number_once(widths: list[int], tokens: int, ranks: int) -> None:
    found = list(groups(widths, tokens, ranks))
    assert sorted(number for group in found for number in group.members) == list(range(len(widths)))
    longest = [group.width for group in found]
    assert longest == sorted(longest, reverse=True)
    for group in found:
        assert group.width == max(widths[number] for number in group.members)
        each = -(-len(group.members) // ranks)
        assert each <= ROWS
        assert each == 1 or each * group.width <= tokens
