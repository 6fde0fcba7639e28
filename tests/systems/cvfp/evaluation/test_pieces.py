"""Contexts of documents and of a stream in parts, against the tokens one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.systems.cvfp.evaluation.pieces import Reading, padded, read
from tests.systems.cvfp.evaluation.reading import ONE, Recurrence, documents


def one_after_another(model: Recurrence, sequences: list[np.ndarray]) -> torch.Tensor:
    found = [model.contexts(*padded([one], model.device))[0] for one in sequences]
    return torch.cat(found)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), st.integers(1, 4), st.integers(1, 30), st.booleans())
def test_documents_are_read_from_zero_each_once(lengths: list[int], rows: int, tokens: int, training: bool) -> None:
    data, model = documents(lengths, len(lengths) // 2), Recurrence()
    reading = Reading(data, "document", rows, 6)
    tokens = min(tokens, reading.available(training=training))
    pieces = list(read(model, reading, tokens, ONE, training=training))
    found = torch.cat([piece.contexts[piece.mask] for piece in pieces])
    ids = torch.cat([piece.ids[piece.mask] for piece in pieces])
    expected = reading.chosen(tokens, training=training)
    assert ids.tolist() == np.concatenate(expected).tolist() and len(ids) == tokens
    assert (found == one_after_another(model, expected)).all()
    side = range(data.training) if training else range(data.training, len(lengths))
    assert reading.available(training=training) == sum(min(6, lengths[index]) for index in side)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 60), st.integers(1, 7), st.integers(1, 9))
def test_a_stream_in_parts_is_that_of_the_tokens_one_after_the_other(tokens: int, rows: int, length: int) -> None:
    data, model = documents([1, tokens // 2, tokens - tokens // 2], 1), Recurrence()
    reading = Reading(data, "stream", rows, length)
    assert reading.available(training=False) == tokens
    pieces = list(read(model, reading, tokens, ONE, training=False))
    masks, contexts = torch.cat([piece.mask for piece in pieces], 1), torch.cat([piece.contexts for piece in pieces], 1)
    expected = one_after_another(model, [data.tokens[1:]])
    difference = (contexts[masks] - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert len(contexts[masks]) == tokens and float(difference.max()) < 1e-3


def test_a_stream_that_forgets_nothing_is_read_as_often_as_it_has_parts_and_once_more() -> None:
    data, model = documents([1, 24], 1), Recurrence(factor=1.0)
    model.applied = lambda contexts, ids: contexts.double() @ model.recurrent.T + model.embedded(ids)  # type: ignore[method-assign]
    pieces = list(read(model, Reading(data, "stream", 6, 4), 24, ONE, training=False))
    masks, contexts = torch.cat([piece.mask for piece in pieces], 1), torch.cat([piece.contexts for piece in pieces], 1)
    torch.testing.assert_close(contexts[masks], one_after_another(model, [data.tokens[1:]]))
    # Once for each part until no border moves, for what is given, and the tokens one after the other.
    assert model.calls == 6 + 1 + 1


def test_the_first_token_of_a_ring_goes_on_from_the_last_one() -> None:
    data, model = documents([1, 24], 1), Recurrence()
    pieces = list(read(model, Reading(data, "circular", 3, 8), 24, ONE, training=False))
    contexts = pieces[0].contexts
    first = model.applied(contexts[-1:, -1:], torch.from_numpy(data.tokens[1:2].astype(np.int64))[None])
    assert float((contexts[0, 0] - first[0, 0]).norm()) < 1e-4 * float(first.norm())


def test_of_no_sequence_there_is_a_row_without_a_token() -> None:
    ids, mask = padded([], torch.device("cpu"))
    assert ids.shape == (1, 1) and not mask.any()


@pytest.mark.parametrize(("carry", "lengths"), [("document", [5, 6, 1]), ("stream", [5, 7])])
def test_what_is_chosen_ends_where_the_tokens_end(carry: str, lengths: list[int]) -> None:
    reading = Reading(documents([5, 9, 4, 7], 3), carry, 2, 6)
    assert [len(one) for one in reading.chosen(10, training=True)] == [5, 5]
    assert [len(one) for one in reading.chosen(12, training=True)] == lengths


def test_fewer_tokens_are_of_documents_from_everywhere() -> None:
    data = documents([4] * 20, 20)
    reading = Reading(data, "document", 2, 6)
    found = [one.tolist() for one in reading.chosen(18, training=True)]
    # 80 tokens are four times as many.
    assert found == [data.document(index).tolist() for index in (0, 4, 8, 12)] + [data.document(16)[:2].tolist()]
    ends = [one.tolist() for one in Reading(data, "stream", 2, 6).chosen(18, training=True)]
    assert ends == [data.document(index).tolist() for index in range(4)] + [data.document(4)[:2].tolist()]
