"""Passes over documents and over parts of the stream: complete, the same for every layout, at an exact position."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.systems.cvfp.data.loader import PassLoader
from pipeline.systems.cvfp.documents import DocumentBatch, DocumentSet
from tests.systems.cvfp.data.harness import random_documents

LENGTH = 5
LAYOUTS = ((1, 1, 12), (1, 3, 4), (3, 1, 4), (2, 2, 3), (4, 3, 1))
"""(data degree, grad_accum, batch_size), of twelve rows each."""
lengths = st.lists(st.integers(2, LENGTH), min_size=15, max_size=40)


def ranks(documents: DocumentSet, layout: tuple[int, int, int] = (1, 1, 12), **options: Any) -> list[PassLoader]:
    degree, accum, size = layout
    plain = {"held_out": False, "length": LENGTH, "seed": 3} | options
    shape: dict[str, Any] = {"data_degree": degree, "grad_accum": accum, "batch_size": size}
    return [PassLoader(documents, data_rank=rank, **shape, **plain) for rank in range(degree)]


def step(loaders: list[PassLoader]) -> dict[str, Any]:
    """One step, in the order of its rows."""
    batches: list[DocumentBatch] = [batch for loader in loaders for batch in loader.next_step()]
    assert {batch.rows for batch in batches} == {loaders[0].batch_size}
    facts = {(batch.slot, batch.slots, batch.iteration) for batch in batches}
    assert len(facts) == 1
    rows = {
        name: torch.cat([getattr(batch, name) for batch in batches]).tolist()
        for name in ("ids", "lengths", "streams", "first")
    }
    return {**rows, "position": facts.pop()}


def rows(found: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """(global position, tokens) of each row that has some; behind a row's length there are zeros."""
    kept = []
    for ids, length, first in zip(found["ids"], found["lengths"], found["first"], strict=True):
        assert not any(ids[length:])
        if length:
            kept.append((first, ids[:length]))
    return kept


@given(lengths, st.booleans(), st.booleans())
def test_a_pass_reads_every_document_once_where_it_stands(sizes: list[int], shuffle: bool, held_out: bool) -> None:
    documents = random_documents(sizes, training=len(sizes) // 2)
    (loader,) = ranks(documents, shuffle=shuffle, held_out=held_out)
    count = len(sizes) - len(sizes) // 2 if held_out else len(sizes) // 2
    assert loader.slots == (count + 11) // 12
    read = [row for _ in range(loader.slots) for row in rows(step([loader]))]
    side = range(len(sizes) // 2, len(sizes)) if held_out else range(len(sizes) // 2)
    expected = [(sum(sizes[:index]), documents.document(index).tolist()) for index in side]
    assert (sorted(read) == expected) if shuffle else (read == expected)


@given(st.lists(st.integers(2, 9), min_size=30, max_size=60), st.integers(0, 12))
def test_parts_of_the_stream_are_contiguous_and_differ_by_a_token(sizes: list[int], held: int) -> None:
    documents = random_documents(sizes, training=len(sizes) - held)
    (loader,) = ranks(documents, stream=True)
    total = sum(sizes[: len(sizes) - held])
    parts: dict[int, list[tuple[int, list[int]]]] = {}
    for slot in range(loader.slots):
        found = step([loader])
        assert found["position"] == (slot, loader.slots, 0)
        assert max(found["lengths"]) - min(found["lengths"]) <= 1 and max(found["lengths"]) <= LENGTH
        for stream, row in zip(found["streams"], rows(found), strict=True):
            parts.setdefault(stream, []).append(row)
    whole: list[int] = []
    for stream in range(12):
        for first, tokens in parts[stream]:
            assert first == len(whole)
            whole += tokens
    assert whole == documents.tokens[:total].tolist()
    sizes_of_parts = [sum(len(tokens) for _, tokens in part) for part in parts.values()]
    assert max(sizes_of_parts) - min(sizes_of_parts) <= 1
    assert loader.slots == -(-max(sizes_of_parts) // LENGTH), "no more steps than needed"


@given(st.lists(st.integers(2, 9), min_size=30, max_size=60), st.integers(0, 12))
def test_adjacent_pieces_of_a_step_follow_each_other_and_so_do_steps(sizes: list[int], held: int) -> None:
    documents = random_documents(sizes, training=len(sizes) - held)
    (loader,) = ranks(documents, stream=True, adjacent=True)
    place, read = 0, []
    for _ in range(loader.slots):
        found = step([loader])
        assert min(found["lengths"]) >= 1 and max(found["lengths"]) <= LENGTH
        assert max(found["lengths"]) - min(found["lengths"]) <= 1
        for first, tokens in rows(found):
            assert first == place
            place += len(tokens)
            read += tokens
    assert read == documents.tokens[: sum(sizes[: len(sizes) - held])].tolist()
    (parts,) = ranks(documents, stream=True)
    with pytest.raises(UserError):
        parts.load_state_dict(loader.state_dict())


@pytest.mark.parametrize("stream", [False, True])
def test_every_layout_reads_the_same_in_every_pass(stream: bool) -> None:
    documents = random_documents([2 + index % 4 for index in range(61)], training=55)
    runs = [ranks(documents, layout, stream=stream) for layout in LAYOUTS]
    slots = runs[0][0].slots
    first_pass = None
    for iteration in range(2):
        steps = []
        for _ in range(slots):
            everyone = [step(loaders) for loaders in runs]
            assert all(found == everyone[0] for found in everyone)
            assert everyone[0]["streams"] == list(range(12))
            steps.append(rows(everyone[0]))
            assert everyone[0]["position"][2] == iteration
        assert first_pass is None or steps == first_pass
        first_pass = steps


def test_the_order_is_that_of_the_seed() -> None:
    documents = random_documents([4] * 40, training=40)
    orders = [rows(step(ranks(documents, seed=seed))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != rows(step(ranks(documents, shuffle=False)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_resumed_loader_goes_on_on_another_layout(stream: bool) -> None:
    documents = random_documents([3] * 55, training=50)
    whole = ranks(documents, stream=stream)
    for _ in range(whole[0].slots + 1):
        step(whole)
    state = json.loads(json.dumps(whole[0].state_dict()))
    assert (state["epoch"], state["offset"]) == (1, 1)
    resumed = ranks(documents, (3, 2, 2), stream=stream)
    for loader in resumed:
        loader.load_state_dict(state)
    for _ in range(4):
        assert step(resumed) == step(whole)
    for loader in (*whole, *resumed):
        loader.reset()
    assert step(resumed) == step(whole) == step(ranks(documents, stream=stream))


def test_a_state_of_other_data_is_refused() -> None:
    documents = random_documents([3] * 50, training=45)
    state = ranks(documents)[0].state_dict()
    for other, flag in (
        (ranks(random_documents([3] * 50, training=45, seed=1))[0], "--data.path or --data.dataset"),
        (ranks(documents, (1, 1, 6))[0], "global batch"),
        (ranks(documents, seed=4)[0], "--seed"),
        (ranks(documents, shuffle=False)[0], "--data.shuffle"),
        (ranks(documents, length=6)[0], "--sequence-length"),
    ):
        with pytest.raises(UserError, match=flag):
            other.load_state_dict(state)
        assert (other.epoch, other.state_dict()["offset"]) == (0, 0)


def test_too_little_to_read_is_refused() -> None:
    with pytest.raises(UserError, match="no document to hold out"):
        ranks(random_documents([3] * 4, training=4), held_out=True)
    with pytest.raises(UserError, match=r"23 tokens of training are fewer than 2 for each of 12 parts.*--batch-size"):
        ranks(random_documents([3] * 7 + [2, 3], training=8), stream=True)
    (loader,) = ranks(random_documents([3] * 3, training=2))
    assert step([loader])["lengths"] == [3, 3] + [0] * 10, "rows without a document"


def test_the_line_for_the_log() -> None:
    documents = random_documents([3] * 50, training=45)
    assert ranks(documents)[0].describe() == "random: 45 documents to train on, 135 tokens, a pass in 4 steps"
    assert "as one stream" in ranks(documents, stream=True)[0].describe()
