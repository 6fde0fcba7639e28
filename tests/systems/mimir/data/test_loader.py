"""Epochs of peptides: the same steps for every layout, weights of the last batch, an exact position."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.systems.mimir.data.loader import PeptideLoader
from pipeline.systems.mimir.peptides import PeptideBatch, Peptides

Layout = tuple[int, int, int]
"""(data degree, grad_accum, batch_size)"""


def peptides(count: int, interacting: int) -> Peptides:
    """Peptide i has the target i, and of its residues the first two say i."""
    letters = np.zeros((count, 20), np.uint8)
    letters[:, 0], letters[:, 1] = np.arange(count) % 20, np.arange(count) // 20
    labels = (np.arange(count) < interacting).astype(np.int8)
    return Peptides(letters, np.full(count, 7, np.uint8), labels, np.arange(count, dtype=np.int32))


def ranks(layout: Layout, count: int, interacting: int = 0, **options: Any) -> list[PeptideLoader]:
    degree, accum, size = layout
    plain = {"name": "training", "fingerprint": "abc", "seed": 3} | options
    shape = {"data_degree": degree, "grad_accum": accum, "batch_size": size}
    data = peptides(count, interacting)
    return [PeptideLoader(data, data_rank=rank, **shape, **plain) for rank in range(degree)]


def step(loaders: list[PeptideLoader]) -> dict[str, list[Any]]:
    """One step, in the order of its rows."""
    batches = [batch for loader in loaders for batch in loader.next_step()]
    assert {batch.rows for batch in batches} == {loaders[0].batch_size}
    names = [name for name in PeptideBatch.__dataclass_fields__ if name != "domain"]
    return {name: torch.cat([getattr(batch, name) for batch in batches]).tolist() for name in names}


def real(found: dict[str, list[Any]], name: str = "targets") -> list[int]:
    return [value for value, weight in zip(found[name], found["weights"], strict=True) if weight]


@st.composite
def two_layouts(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """Two ways to divide one global batch."""
    rows = draw(st.integers(1, 24))

    def layout() -> Layout:
        degree = draw(st.sampled_from([d for d in range(1, rows + 1) if rows % d == 0]))
        rest = rows // degree
        size = draw(st.sampled_from([s for s in range(1, rest + 1) if rest % s == 0]))
        return degree, rest // size, size

    return layout(), layout()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(two_layouts(), st.integers(1, 60), st.data())
def test_every_layout_reads_the_same_steps_and_goes_on_from_any_other(
    layouts: tuple[Layout, Layout], count: int, data: st.DataObject
) -> None:
    interacting, balanced = data.draw(st.integers(0, count)), data.draw(st.booleans())
    one, two = (ranks(layout, count, interacting, balanced=balanced) for layout in layouts)
    for _ in range(data.draw(st.integers(0, 8))):
        assert step(one) == step(two)
    states = [json.loads(json.dumps(loader.state_dict())) for loader in one]
    assert all(state == states[0] for state in states)
    again = ranks(layouts[1], count, interacting, balanced=balanced)
    for loader in again:
        loader.load_state_dict(states[0])
    for _ in range(3):
        assert step(one) == step(again)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 24))
def test_an_epoch_has_every_peptide_once_and_rows_of_no_weight_fill_its_last_batch(count: int, rows: int) -> None:
    (loader,) = ranks((1, 1, rows), count)
    draws, orders = [], []
    for epoch in range(3):
        found = [step([loader]) for _ in range(loader.steps_per_epoch)]
        assert loader.epoch == epoch + 1
        assert [len(real(part)) for part in found[:-1]] == [rows] * (len(found) - 1)
        assert all(set(part["weights"][len(real(part)) :]) <= {0.0} for part in found)
        read = [target for part in found for target in real(part)]
        assert sorted(read) == list(range(count))
        draws += [draw for part in found for draw in real(part, "draws")]
        np.testing.assert_allclose(
            [value for part in found for value in real(part, "epochs")],
            epoch + np.arange(count) / count,
            rtol=1e-6,
        )
        orders.append(tuple(read))
    assert draws == list(range(3 * count))
    if count > 20:
        assert len(set(orders)) == 3


@pytest.mark.parametrize(("count", "interacting"), [(101, 7), (100, 90), (64, 32)])
def test_balanced_epochs_have_both_kinds_equally_often_and_within_a_kind_each_as_often(
    count: int, interacting: int
) -> None:
    (loader,) = ranks((1, 1, 16), count, interacting, balanced=True)
    epochs = 6
    labels, seen = [], Counter()
    for _ in range(epochs * loader.steps_per_epoch):
        found = step([loader])
        labels += real(found, "labels")
        seen.update(real(found))
    assert len(labels) == epochs * count
    assert abs(sum(labels) - len(labels) / 2) <= epochs / 2
    for kind in (range(interacting), range(interacting, count)):
        times = [seen[place] for place in kind]
        assert max(times) - min(times) <= 1


def test_without_shuffling_the_order_is_that_of_the_peptides() -> None:
    (loader,) = ranks((1, 1, 8), 20, shuffle=False, domain="held out")
    first = step([loader])
    assert first["targets"] == list(range(8))
    assert loader.next_step()[0].domain == "held out"
    loader.reset()
    assert step([loader]) == first


def test_the_rows_are_those_of_the_peptides() -> None:
    (loader,) = ranks((1, 2, 4), 50, 20)
    found = step([loader])
    for letters, target, label, length in zip(
        found["letters"], found["targets"], found["labels"], found["lengths"], strict=True
    ):
        assert letters == [target % 20, target // 20] + [0] * 18
        assert (label, length) == (int(target < 20), 7)


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(UserError, match="holds no example"):
        ranks((1, 1, 4), 0)
    (one,), (other,) = ranks((1, 1, 4), 20), ranks((1, 1, 4), 20, fingerprint="abd")
    with pytest.raises(UserError, match=r"--data\.path or --data\.dataset does not give the data of the checkpoint"):
        other.load_state_dict(one.state_dict())
    (seeded,) = ranks((1, 1, 4), 20, seed=4)
    with pytest.raises(UserError, match="--seed"):
        seeded.load_state_dict(one.state_dict())
