"""Epochs of map-style examples: the same steps for every layout, every example once, an exact position."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.data.epochs import EpochLoader
from pipeline.errors import UserError


@dataclasses.dataclass(frozen=True)
class Numbers:
    values: Tensor
    places: Tensor
    """Global rows of the step."""

    @property
    def rows(self) -> int:
        return len(self.values)

    def to(self, device: torch.device) -> Numbers:
        return Numbers(self.values.to(device), self.places.to(device))


def collate(examples: list[int], rows: range) -> Numbers:
    return Numbers(torch.tensor(examples), torch.tensor(rows))


Layout = tuple[int, int, int]
"""(data degree, grad_accum, batch_size)"""


def ranks(layout: Layout, count: int, **options: Any) -> list[EpochLoader[Numbers]]:
    """The loaders of all data ranks; example i is i."""
    degree, accum, size = layout
    plain = {"name": "numbers", "fingerprint": {"content": "abc"}, "seed": 3} | options
    shape = {"data_degree": degree, "grad_accum": accum, "batch_size": size}
    return [EpochLoader(range(count), collate, data_rank=rank, **shape, **plain) for rank in range(degree)]


def step(loaders: list[EpochLoader[Numbers]]) -> list[int]:
    """The examples of one step, in the order of its rows."""
    batches = [batch for loader in loaders for batch in loader.next_step()]
    assert {batch.rows for batch in batches} == {loaders[0].batch_size}
    assert torch.cat([batch.places for batch in batches]).tolist() == list(range(loaders[0].rows))
    return torch.cat([batch.values for batch in batches]).tolist()


def state(loaders: list[EpochLoader[Numbers]]) -> dict[str, Any]:
    """What a checkpoint keeps, as JSON: every rank is at the same place."""
    states = [loader.state_dict() for loader in loaders]
    assert all(other == states[0] for other in states)
    return json.loads(json.dumps(states[0]))


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


@settings(max_examples=150, deadline=None, derandomize=True)
@given(two_layouts(), st.integers(1, 60), st.integers(0, 12), st.booleans(), st.booleans())
def test_a_resume_at_any_step_on_any_layout_goes_on_with_the_same_steps(layouts, count, before, shuffle, used) -> None:
    first, second = layouts
    running, resumed = ranks(first, count, shuffle=shuffle), ranks(second, count, shuffle=shuffle)
    for _ in range(before):
        step(running)
    if used:
        step(resumed)
    for loader in resumed:
        loader.load_state_dict(state(running))
    assert state(resumed) == state(running)
    for _ in range(5):
        assert step(running) == step(resumed)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(two_layouts(), st.integers(1, 60), st.integers(0, 5), st.booleans())
def test_every_epoch_has_every_example_once_and_a_partial_batch_goes_on_in_the_next(
    layouts, count, seed, shuffle
) -> None:
    loaders = ranks(layouts[0], count, seed=seed, shuffle=shuffle)
    rows, epochs = loaders[0].rows, 3
    read: list[int] = []
    for number in range(1, loaders[0].steps(epochs) + 1):
        read += step(loaders)
        assert len(read) == number * rows, "no batch is short"
        assert all(loader.epoch == len(read) // count for loader in loaders)
    assert epochs * count <= len(read) < epochs * count + rows
    for epoch in range(epochs):
        assert Counter(read[epoch * count : (epoch + 1) * count]) == Counter(range(count))
    if not shuffle:
        assert read == [index % count for index in range(len(read))]


def test_seed_and_epoch_change_the_order() -> None:
    layout, count = (1, 1, 40), 40
    one = ranks(layout, count)
    first, second = step(one), step(one)
    assert sorted(first) == sorted(second) == list(range(count)) and first != second
    assert step(ranks(layout, count, seed=4)) != first
    assert step(ranks(layout, count)) == first


def test_the_position_is_a_few_integers_however_many_examples_there_are() -> None:
    # A list of the order would hold 10^15 numbers.
    (loader,) = ranks((1, 2, 4), 10**15)
    examples = step([loader])
    assert len(set(examples)) == 8 and max(examples) > 10**12
    found = state([loader])
    assert found.pop("fingerprint") == {"content": "abc", "examples": 10**15, "seed": 3, "shuffle": True}
    assert found == {"epoch": 0, "offset": 8}


def test_another_global_batch_goes_on_at_the_same_example() -> None:
    small, large = ranks((1, 1, 3), 10), ranks((2, 1, 3), 10)
    for _ in range(3):
        step(small)
    for loader in large:
        loader.load_state_dict(state(small))
    assert step(large) == step(small) + step(small)


def test_reset_goes_back_to_the_start() -> None:
    loaders = ranks((2, 1, 3), 10)
    first = [step(loaders) for _ in range(4)]
    for loader in loaders:
        loader.reset()
    assert [step(loaders) for _ in range(4)] == first


def test_a_step_that_cannot_be_read_leaves_the_position_where_it_was() -> None:
    class Failing(list):
        broken = True

        def __getitem__(self, index: Any) -> Any:
            if index == 5 and self.broken:
                raise UserError("row 5 cannot be read")
            return super().__getitem__(index)

    examples = Failing(range(8))
    loader = EpochLoader(examples, collate, name="rows", fingerprint={}, batch_size=4, shuffle=False)
    loader.next_step()
    before = loader.state_dict()
    with pytest.raises(UserError, match="row 5"):
        loader.next_step()
    assert loader.state_dict() == before
    examples.broken = False
    assert loader.next_step()[0].values.tolist() == [4, 5, 6, 7]


def test_other_data_is_refused_at_a_resume(refusal: Callable[..., str]) -> None:
    saved = state(ranks((1, 1, 2), 10))
    for flag, count, options in (
        ("content", 10, {"fingerprint": {"content": "abd"}}),
        ("examples", 11, {}),
        ("--seed", 10, {"seed": 4}),
        ("--data.shuffle", 10, {"shuffle": False}),
    ):
        (loader,) = ranks((1, 1, 2), count, **options)
        message = refusal(loader.load_state_dict, saved)
        assert message.startswith(f"{flag} does not give the data of the checkpoint"), message


def test_a_log_line_says_how_long_an_epoch_is() -> None:
    assert ranks((2, 1, 4), 1000)[0].describe() == "numbers: 1,000 examples, an epoch in 125.0 steps"


def test_no_example_is_a_users_error(refusal: Callable[..., str]) -> None:
    assert refusal(ranks, (1, 1, 2), 0) == "numbers holds no example: give data with at least one"
