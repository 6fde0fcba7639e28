"""The recall task: layout, gaps, labels, position, refusals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.data.synthetic import RecallLoader, recall_gaps
from pipeline.data_config import RecallConfig
from pipeline.errors import UserError


@st.composite
def configs(draw: st.DrawFn) -> RecallConfig:
    pairs = draw(st.integers(1, 10))
    queries = draw(st.integers(1, pairs))
    min_gap = draw(st.integers(1, 90))
    least = max(2 * pairs - 1 + min_gap, 2 * pairs + 1) + 2 * queries - 3
    return RecallConfig(
        keys=draw(st.integers(pairs, 20)),
        values=draw(st.integers(1, 20)),
        fillers=draw(st.integers(1, 20)),
        pairs=pairs,
        queries=queries,
        min_gap=min_gap,
        max_gap=draw(st.integers(least, least + 60)),
    )


def loader(config: RecallConfig | None = None, **options) -> RecallLoader:
    return RecallLoader(config or RecallConfig(), **({"sequence_length": 320, "batch_size": 4} | options))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(configs(), st.integers(0, 40), st.integers(0, 1000))
def test_every_query_keeps_to_the_gaps(config: RecallConfig, extra: int, seed: int) -> None:
    batch = loader(config, sequence_length=config.least_length + extra, batch_size=2, seed=seed).next_step()[0]
    gaps = recall_gaps(batch.input_ids, batch.labels)
    first_value, first_filler = 1 + config.keys, 1 + config.keys + config.values
    for ids, labels, row in zip(batch.input_ids.tolist(), batch.labels.tolist(), gaps.tolist(), strict=True):
        head = 2 * config.pairs
        stored = dict(zip(ids[0:head:2], ids[1:head:2], strict=True))
        assert len(stored) == config.pairs and all(1 <= key < first_value for key in stored)
        assert all(first_value <= value < first_filler for value in stored.values())
        assert ids[head] == 0 and ids.count(0) == 1
        queries = [t for t, label in enumerate(labels) if label != IGNORED]
        assert len(queries) == config.queries == len({ids[t] for t in queries})
        rest = set(range(head + 1, len(ids))) - set(queries) - {t + 1 for t in queries}
        assert all(first_filler <= ids[t] < config.vocab_size for t in rest)
        for t in queries:
            assert labels[t] == ids[t + 1] == stored[ids[t]]
            assert row[t] == t - (ids.index(ids[t]) + 1)
            assert config.min_gap <= row[t] <= config.max_gap
        assert all(row[t] == -1 for t in range(len(ids)) if t not in queries)


def test_gaps_spread_over_the_whole_range() -> None:
    config = RecallConfig(min_gap=64, max_gap=240)
    batch = loader(config, batch_size=400).next_step()[0]
    gaps = recall_gaps(batch.input_ids, batch.labels)
    gaps = gaps[gaps >= 0].double()
    assert gaps.min() < 70 and gaps.max() > 234 and 140 < gaps.mean() < 164
    assert 0.4 < (gaps % 2).mean() < 0.6
    assert torch.histc(gaps, 4, 64, 241).min() > 0.6 * len(gaps) / 4


def test_a_row_is_a_document() -> None:
    recall = loader()
    for number in range(3):
        batch = recall.next_step()[0]
        assert (batch.segment_ids == number).all()
        assert torch.equal(batch.positions, torch.arange(320).expand(4, -1))
        assert all(getattr(batch, field.name).dtype == torch.int64 for field in dataclasses.fields(TokenBatch))
    assert batch.streams.tolist() == [0, 1, 2, 3]


def test_rows_depend_on_seed_side_stream_and_step_alone() -> None:
    whole = loader(batch_size=12)
    split = [loader(batch_size=2, grad_accum=2, data_rank=rank, data_degree=3) for rank in range(3)]
    for _ in range(2):
        batch = whole.next_step()[0]
        parts = [part for rank in split for part in rank.next_step()]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), batch.input_ids)
        assert torch.cat([part.streams for part in parts]).tolist() == list(range(12))
    rows = {tuple(row) for step in range(2) for row in loader(batch_size=12).next_step()[0].input_ids.tolist()}
    assert len(rows) == 12
    first = whole.next_step()[0].input_ids
    for other in (loader(batch_size=12, seed=1), loader(batch_size=12, held_out=True)):
        for _ in range(3):
            ids = other.next_step()[0].input_ids
        assert not any(torch.equal(a, b) for a in ids for b in first)


def test_resume_and_reset() -> None:
    recall = loader(batch_size=6)
    first = recall.next_step()[0]
    recall.next_step()
    state = json.loads(json.dumps(recall.state_dict()))
    resumed = loader(batch_size=3, grad_accum=2)
    resumed.load_state_dict(state)
    expected = recall.next_step()[0]
    assert torch.equal(torch.cat([b.input_ids for b in resumed.next_step()]), expected.input_ids)
    recall.reset()
    assert torch.equal(recall.next_step()[0].labels, first.labels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pairs": 0}, "recall pairs is 0"),
        ({"keys": 3}, "recall has 3 keys for 8 pairs"),
        ({"queries": 9}, "recall has 9 queries for 8 pairs"),
        ({"min_gap": 230}, "raise max_gap to "),
    ],
)
def test_refusals(fields: dict[str, int], message: str, refusal: Callable[..., str]) -> None:
    said = refusal(RecallConfig, **fields)
    assert message in said
    if "raise max_gap" in said:
        RecallConfig(**fields, max_gap=int(said.split("raise max_gap to ")[1].split()[0]))
        with pytest.raises(UserError):
            RecallConfig(**fields, max_gap=int(said.split("raise max_gap to ")[1].split()[0]) - 1)


def test_resume_refusals(refusal: Callable[..., str]) -> None:
    assert "give 243 or more" in refusal(loader, sequence_length=242)
    state = loader().state_dict()
    assert "a resume keeps the global batch" in refusal(loader(batch_size=8).load_state_dict, state)
    assert "--seed does not give the data" in refusal(loader(seed=1).load_state_dict, state)
    assert "pairs 8, now 4" in refusal(loader(RecallConfig(pairs=4, queries=4)).load_state_dict, state)
