"""Facts: every question is of what was told last, at the distance it says; position, streams, resume."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batch import IGNORED
from pipeline.errors import UserError
from pipeline.systems.neuromorphic.facts import EOS, NONE, FactsBatch, FactsLoader, told
from pipeline.systems.neuromorphic.facts_config import FactsConfig

TASK = FactsConfig(facts=4, within=2, documents=3, least_distance=20, least_tokens=60, most_tokens=90, domains=2)


def loader(task: FactsConfig = TASK, **options) -> FactsLoader:
    return FactsLoader(task, **({"sequence_length": 64, "batch_size": 2} | options))


def text(read: FactsLoader, steps: int) -> FactsBatch:
    """The micro-batches of `steps` steps behind each other; one micro-batch a step."""
    batches = [read.next_step()[0] for _ in range(steps)]
    names = FactsBatch.__dataclass_fields__
    joined = {name: torch.cat([getattr(b, name) for b in batches], 1) for name in names if name != "streams"}
    return FactsBatch(**joined, streams=batches[0].streams)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 5), st.integers(0, 5), st.integers(0, 4), st.integers(1, 60), st.integers(0, 40), st.integers(0, 99)
)
def test_every_question_is_of_a_fact_told_once(
    facts: int, within: int, documents: int, distance: int, extra: int, seed: int
) -> None:
    within = min(facts, within) if documents else facts
    keys = 2 * facts * max(1, documents)
    fewest = None if seed % 2 else 1 + seed % facts
    task = FactsConfig(keys, 16, 7, 2, facts, fewest, within, documents, distance, 10**4, 10**4)
    task = dataclasses.replace(task, least_tokens=task.least_room, most_tokens=task.least_room + extra)
    batch = text(loader(task, seed=seed, batch_size=1), 12)
    ids, labels, segments = (x[0].tolist() for x in (batch.input_ids, batch.labels, batch.segment_ids))
    asked = {
        t: (d, n) for t, (d, n) in enumerate(zip(batch.tokens[0].tolist(), batch.documents[0].tolist(), strict=True))
    }
    known: dict[int, tuple[int, int]] = {}
    for t in range(len(ids) - 1):
        ended = ids[t] == EOS
        assert labels[t] == (IGNORED if ended else ids[t + 1])
        assert (segments[t + 1] == segments[t] + 1) if ended else (segments[t + 1] == segments[t])
        is_key = 1 <= ids[t] <= keys
        if not is_key:
            assert asked[t] == (NONE, NONE)
        elif asked[t] == (NONE, NONE):
            assert ids[t] not in known  # not told again before it is asked for
            known[ids[t]] = (ids[t + 1], t + 1)
        else:
            value, at = known.pop(ids[t])
            assert labels[t] == value and asked[t] == (t - at, segments[t] - segments[at])
            assert asked[t][1] > 0 or asked[t][0] >= distance
            assert asked[t][1] <= documents
    lengths = np.bincount(segments)[1:-1]
    assert all(task.least_tokens <= length <= task.most_tokens for length in lengths)


def test_every_fact_is_asked_for_once() -> None:
    batch = text(loader(batch_size=1), 60)
    within = (batch.documents == 0).sum().item()
    later = (batch.documents > 0).sum().item()
    documents = int(batch.segment_ids.max())
    assert 2 * (documents - 1) <= within <= 2 * (documents + 1)
    assert 2 * (documents - 3) <= later <= 2 * (documents + 1)
    assert set(batch.documents.unique().tolist()) == {NONE, 0, 1, 2, 3}


def test_values_and_domains_are_all_drawn() -> None:
    ids = text(loader(batch_size=4), 40).input_ids
    counts = torch.bincount(ids.flatten(), minlength=TASK.vocab)
    assert len(counts) == TASK.vocab and counts.min() > 0
    values = counts[TASK.first_value : TASK.first_filler]
    assert values.max() < 2 * values.min()


def test_documents_tell_different_numbers_of_facts() -> None:
    task = dataclasses.replace(TASK, fewest=1)
    counts = [len(told(task, document, "a").keys) for document in range(400)]
    assert set(counts) == {1, 2, 3, 4} and min(np.bincount(counts)[1:]) > 70
    batch = text(loader(task, batch_size=1), 100)
    assert (batch.documents == 0).any() and (batch.documents > 0).any()
    assert {len(told(TASK, document, "a").keys) for document in range(20)} == {4}


def test_labels_of_facts_alone_are_behind_keys_and_values() -> None:
    batch = text(loader(dataclasses.replace(TASK, labels="facts")), 8)
    counted = batch.labels != IGNORED
    is_fact = (batch.input_ids > 0) & (batch.input_ids < TASK.first_filler)
    assert torch.equal(counted, is_fact)


def test_a_stream_is_the_same_on_every_layout_and_cut() -> None:
    whole = text(loader(batch_size=4), 6)
    parts = [text(loader(batch_size=2, data_rank=rank, data_degree=2), 6) for rank in range(2)]
    longer = text(loader(batch_size=4, sequence_length=128), 3)
    for name in FactsBatch.__dataclass_fields__:
        expected = getattr(whole, name)
        assert torch.equal(expected, torch.cat([getattr(part, name) for part in parts]))
        assert torch.equal(expected, getattr(longer, name))
    accumulated = loader(batch_size=2, grad_accum=2).next_step()
    assert torch.equal(torch.cat([b.input_ids for b in accumulated]), whole.input_ids[:, :64])
    assert [b.streams.tolist() for b in accumulated] == [[0, 1], [2, 3]]
    other = text(loader(batch_size=4, held_out=True), 6)
    assert not torch.equal(other.input_ids, whole.input_ids)
    assert not torch.equal(text(loader(batch_size=4, seed=1), 6).input_ids, whole.input_ids)


def test_the_position_is_exact_on_any_layout() -> None:
    whole = loader(batch_size=4)
    text(whole, 5)
    state = json.loads(json.dumps(whole.state_dict()))
    after = text(whole, 5)
    second = loader(batch_size=2, data_rank=1, data_degree=2)
    text(second, 1)
    second.load_state_dict(state)
    found = text(second, 5)
    for name in FactsBatch.__dataclass_fields__:
        assert torch.equal(getattr(found, name), getattr(after, name)[2:])
    whole.reset()
    assert torch.equal(text(whole, 5).input_ids, text(loader(batch_size=4), 5).input_ids)
    with pytest.raises(UserError, match="does not give the data of the checkpoint"):
        loader(dataclasses.replace(TASK, facts=3), batch_size=4).load_state_dict(state)


def test_each_phase_has_its_questions() -> None:
    """Of one fact, of all in the same document, and of later ones; documents of the first two have just the room."""
    phases = {phase: TASK.of_phase(phase) for phase in "ABC"}
    assert phases["C"] is TASK
    varied = dataclasses.replace(TASK, fewest=2)
    assert [varied.of_phase(phase).fewest for phase in "ABC"] == [None, 2, 2]
    assert {phase: (task.facts, task.within, task.documents) for phase, task in phases.items()} == {
        "A": (1, 1, 0), "B": (4, 4, 0), "C": (4, 2, 3)
    }  # fmt: skip
    for task in phases.values():
        assert task.vocab == TASK.vocab and task.most_tokens - task.least_tokens == 30
    for phase in "AB":
        assert phases[phase].least_tokens == phases[phase].least_room
        asked = text(loader(phases[phase], batch_size=1), 20).documents
        assert (asked == 0).any() and not (asked > 0).any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keys": 23}, "--model.facts.keys is 23: a key would be told again before it is asked for: give 24 or more"),
        ({"within": 5}, "--model.facts.within is 5: a document tells 4: give at most that"),
        ({"documents": 0}, "--model.facts.documents is 0, and 2 of the 4 facts of a document are asked for in a later"),
        ({"least_tokens": 35}, "--model.facts.least-tokens is 35: a document has no room for its questions: give 36"),
        ({"most_tokens": 59}, "--model.facts.most-tokens is 59: give --model.facts.least-tokens, 60, or more"),
        ({"values": 0}, "--model.facts.values is 0: give 1 or more"),
        ({"fewest": 0}, "--model.facts.fewest is 0: a document tells up to 4: give 1 to 4"),
        ({"fewest": 5}, "--model.facts.fewest is 5: a document tells up to 4: give 1 to 4"),
        ({"documents": -1}, "--model.facts.documents is -1: give 0 or more"),
    ],
)
def test_refusals(changed: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TASK, **changed)
