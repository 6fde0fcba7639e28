import dataclasses

import pytest
import torch

from pipeline.systems.neuromorphic.memory.resets import distinct_rows, reset_episodic, reset_procedural
from tests.systems.neuromorphic.memory import small

FIRST = torch.tensor([True, False])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.fixture
def emptied():
    memory = small.procedural()
    state = small.procedural_state(memory)
    initial = memory.initial_state(small.ROWS, torch.float64)
    return state, initial, reset_procedural(state, *memory.initial_rows(torch.float64), FIRST)


def test_a_reset_leaves_other_streams_the_same_bits(emptied):
    state, initial, after = emptied
    for item in dataclasses.fields(state):
        before, empty, found = (getattr(s, item.name) for s in (state, initial, after))
        assert same_bits(found[1], before[1])
        assert same_bits(found[0], empty[0])
        assert not same_bits(found[0], before[0])


def test_an_emptied_procedural_memory_has_distinct_rows_of_no_strength(emptied):
    _, _, after = emptied
    assert after.strengths[0].abs().max() == 0
    for rows in (after.keys[0], after.values[0]):
        products = rows @ rows.transpose(-1, -2)
        torch.testing.assert_close(products, torch.eye(3, dtype=torch.float64).expand_as(products), atol=1e-6, rtol=0)


def test_lifelong_only_what_is_eligible_is_emptied():
    memory = small.procedural()
    state = small.procedural_state(memory)
    after = reset_procedural(state, *memory.initial_rows(torch.float64), FIRST, lifelong=True)
    for name in ("keys", "values", "strengths"):
        assert same_bits(getattr(after, name), getattr(state, name))
    for name in ("eligible_keys", "eligible_values"):
        assert getattr(after, name)[0].abs().max() == 0
        assert same_bits(getattr(after, name)[1], getattr(state, name)[1])


def test_an_emptied_episodic_memory_has_no_episode_and_a_lifelong_one_keeps_all():
    state = small.episodic_state(small.episodic())
    after = reset_episodic(state, FIRST)
    assert after.strengths[0].abs().max() == 0
    assert same_bits(after.strengths[1], state.strengths[1])
    assert reset_episodic(state, FIRST, lifelong=True) is state


def test_distinct_rows_depend_on_the_name_alone():
    one = distinct_rows("a", (2, 3, 4))
    torch.manual_seed(7)
    assert same_bits(one, distinct_rows("a", (2, 3, 4)))
    assert not same_bits(one, distinct_rows("b", (2, 3, 4)))
    assert (one[0] - one[1]).abs().max() > 0.1


def test_more_rows_than_their_width_are_unit_rows_in_orthonormal_groups():
    rows = distinct_rows("a", (5, 2)).double()
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(5, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows[:2] @ rows[:2].T, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
