"""Recall over documents of several sequences: gaps on a log scale, labels, position, resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import replace
from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.data.build import build_loader
from pipeline.data.long_recall import FILLER_BLOCK, LongRecallLoader, fillers, long_recall_document
from pipeline.data_config import RecallConfig
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_recall_long

TASK = RecallConfig(keys=16, values=8, fillers=4, max_gap=2048, spread="log")


def loader(**options) -> LongRecallLoader:
    return LongRecallLoader(TASK, **({"sequence_length": 128, "batch_size": 4} | options))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 80), st.integers(0, 3000), st.integers(1, 300), st.integers()
)
def test_every_query_is_answered_by_its_pair(
    pairs: int, queries: int, min_gap: int, extra: int, length: int, seed: int
) -> None:
    queries = min(pairs, queries)
    least = RecallConfig(keys=12, pairs=pairs, queries=queries, min_gap=min_gap, max_gap=10**6).least_gap
    task = RecallConfig(12, 5, 7, pairs, queries, min_gap, least + extra, "log")
    ids, labels = long_recall_document(task, length, seed)
    assert len(ids) == len(labels) and len(ids) % length == 0
    head = 2 * pairs
    stored = {int(key): (int(value), 2 * index + 1) for index, (key, value) in enumerate(ids[:head].reshape(-1, 2))}
    assert len(stored) == pairs and ids[head] == 0 and (ids == 0).sum() == 1
    places = np.flatnonzero(labels != IGNORED)
    assert len(places) == queries == len({int(ids[t]) for t in places})
    for t in places.tolist():
        value, at = stored[int(ids[t])]
        assert labels[t] == value == ids[t + 1]
        assert min_gap <= t - at <= task.max_gap
    rest = np.setdiff1d(np.arange(head + 1, len(ids)), [*places, *(places + 1)])
    assert (ids[rest] >= 1 + task.keys + task.values).all() and (ids[rest] < task.vocab_size).all()
    # As few sequences as hold the last answer and the list.
    assert max(places.max(initial=0) + 2, head + 1) > len(ids) - length


def test_gaps_lie_evenly_on_a_log_scale() -> None:
    gaps = []
    for document in range(400):
        ids, labels = long_recall_document(TASK, 128, document)
        for t in np.flatnonzero(labels != IGNORED):
            gaps.append(t - (np.flatnonzero(ids == ids[t])[0] + 1))
    octaves = np.histogram(np.log2(gaps), bins=[6, 7, 8, 9, 10, 11])[0] / len(gaps)
    assert octaves.min() > 0.015, "every octave up to the largest gap is asked for"
    assert octaves[0] > octaves[4]
    assert 64 <= min(gaps) < 70 and max(gaps) > 1900


@given(st.integers(0, 3 * FILLER_BLOCK), st.integers(0, 3 * FILLER_BLOCK), st.integers(0, 3 * FILLER_BLOCK))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_filler_does_not_depend_on_where_it_is_cut(a: int, b: int, c: int) -> None:
    first, middle, last = sorted((a, b, c))
    whole = fillers(TASK, first, last, "key")
    parts = [fillers(TASK, first, middle, "key"), fillers(TASK, middle, last, "key")]
    assert len(whole) == last - first and np.array_equal(whole, np.concatenate(parts))


def rows_of(batches: list[TokenBatch]) -> list[list[tuple[int, ...]]]:
    names = ("input_ids", "labels", "segment_ids", "positions")
    joined = [torch.cat([getattr(batch, name) for batch in batches]) for name in names]
    return [[tuple(row) for row in tensor.tolist()] for tensor in joined]


def test_a_document_goes_on_in_the_next_step() -> None:
    recall = loader(batch_size=3)
    steps = [recall.next_step()[0] for _ in range(60)]
    for row in range(3):
        ids = torch.cat([step.input_ids[row] for step in steps]).numpy()
        segments = torch.cat([step.segment_ids[row] for step in steps]).numpy()
        positions = torch.cat([step.positions[row] for step in steps]).numpy()
        assert segments[0] == 0 and set(np.diff(segments)) <= {0, 1} and segments[-1] > 1
        for document in range(segments[-1]):
            wanted, _ = long_recall_document(TASK, 128, 0, "training", row, document)
            assert np.array_equal(ids[segments == document], wanted)
            assert np.array_equal(positions[segments == document], np.arange(len(wanted)))


def test_rows_depend_on_seed_side_and_stream_alone() -> None:
    whole = loader(batch_size=12)
    split = [loader(batch_size=2, grad_accum=2, data_rank=rank, data_degree=3) for rank in range(3)]
    for _ in range(5):
        assert rows_of(whole.next_step()) == rows_of([part for rank in split for part in rank.next_step()])
    first = loader().next_step()[0].input_ids
    for other in (loader(seed=1), loader(held_out=True)):
        assert not any(torch.equal(a, b) for a in other.next_step()[0].input_ids for b in first)


def test_resume_and_reset(refusal: Callable[..., str]) -> None:
    recall = loader(batch_size=6)
    first = rows_of(recall.next_step())
    for _ in range(7):
        recall.next_step()
    state = json.loads(json.dumps(recall.state_dict()))
    resumed = loader(batch_size=3, grad_accum=2)
    resumed.load_state_dict(state)
    for _ in range(9):
        assert rows_of(resumed.next_step()) == rows_of(recall.next_step())
    recall.reset()
    assert rows_of(recall.next_step()) == first
    assert "--seed does not give the data" in refusal(loader(batch_size=6, seed=1).load_state_dict, state)
    assert "sequence_length 128, now 64" in refusal(loader(batch_size=6, sequence_length=64).load_state_dict, state)


def test_the_recipe_reads_such_documents() -> None:
    config = replace(miras_recall_long(), batch_size=2)
    found = build_loader(config, Topology(), vocab_size=49)
    assert isinstance(found, LongRecallLoader) and "on a log scale" in found.describe()
    assert math.log2(config.data.recall.max_gap) == 10  # type: ignore[union-attr]
