import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.systems.neuromorphic.columns import unit
from pipeline.systems.neuromorphic.memory.candidates import Candidates
from pipeline.systems.neuromorphic.memory.slots import chosen_slots, written
from pipeline.systems.neuromorphic.state import EpisodicState
from tests.systems.neuromorphic.memory.small import random

EPISODES, WIDTH = 5, 4


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1)


def told(keys: Tensor, novelty: Tensor, positions: list[int] | None = None) -> Candidates:
    """Candidates of one row and one column."""
    count = len(keys)
    return Candidates(
        keys=keys[None, None],
        values=random(1, 1, count, WIDTH, seed=3),
        novelty=novelty.view(1, 1, -1).double(),
        valid=torch.ones(1, 1, count, dtype=torch.bool),
        positions=torch.tensor(positions or list(range(count))).view(1, 1, -1),
        mean_key=keys.mean(0)[None, None],
        mean_novelty=novelty.mean().view(1, 1).double(),
    )


def state(*strengths: float) -> EpisodicState:
    """Keys are the first axes, then minus the first."""
    keys = torch.cat([torch.eye(WIDTH), -torch.eye(1, WIDTH)]).double()[None, None]
    return EpisodicState(keys, random(1, 1, EPISODES, WIDTH, seed=4), column(*strengths))


def choose(candidates: Candidates, before: EpisodicState, gain: float = 0.5):
    return chosen_slots(candidates, before, column(gain), column(1.0), column(0.5))


def near(axis: int) -> Tensor:
    return unit(F.one_hot(torch.tensor(axis), WIDTH).double() + 0.1)


def test_a_candidate_goes_where_its_key_is():
    slots = choose(told(torch.stack([near(2), near(0)]), torch.tensor([0.9, 0.8])), state(1, 1, 1, 1, 1))
    assert slots.index.flatten().tolist() == [2, 0]
    assert slots.matched.all()
    assert slots.written.all()


def test_others_go_to_the_weakest_slots_each_to_its_own():
    keys = unit(torch.ones(3, WIDTH).double() * torch.tensor([[1.0, 1, -1, 1]]))
    slots = choose(told(keys, torch.tensor([0.9, 0.8, 0.7])), state(0.3, 0, 0.2, 0, 0.1))
    assert slots.index.flatten().tolist() == [1, 3, 4]
    assert not slots.matched.any()


def test_a_slot_that_is_matched_is_not_given_away():
    keys = torch.stack([unit(torch.ones(WIDTH).double()), near(1)])
    slots = choose(told(keys, torch.tensor([0.9, 0.8])), state(0.3, 0.05, 0.2, 0.2, 0.1))
    assert slots.index.flatten().tolist() == [4, 1]
    assert slots.matched.flatten().tolist() == [False, True]


def test_a_slot_that_holds_nothing_matches_nothing():
    slots = choose(told(near(1)[None], torch.tensor([0.9])), state(0, 0, 1, 1, 1))
    assert slots.index.item() == 0
    assert not slots.matched.any()


def test_a_stronger_episode_is_not_replaced_by_a_weaker_one():
    keys = unit(torch.ones(2, WIDTH).double())
    slots = choose(told(keys, torch.tensor([0.9, 0.7])), state(2, 2, 0.4, 0.4, 2))
    assert slots.written.flatten().tolist() == [True, False]  # .45 and .35 against .4
    assert slots.index.flatten().tolist()[0] == 2


def test_ties_are_not_replaced():
    key = unit(torch.ones(1, WIDTH).double())
    assert not choose(told(key, torch.tensor([0.5])), state(2, 0.25, 0.25, 0.25, 2)).written.any()


def test_more_candidates_than_slots_leave_some_out():
    keys = unit(random(7, WIDTH, seed=1))
    slots = choose(told(keys, torch.linspace(0.9, 0.3, 7)), state(0, 0, 0, 0, 0))
    assert slots.index.flatten().tolist()[:5] == [0, 1, 2, 3, 4]
    assert slots.written.flatten().tolist() == [True] * 5 + [False] * 2


def test_a_candidate_that_does_not_count_is_not_written():
    candidates = told(torch.stack([near(0), near(1)]), torch.tensor([0.9, 0.8]))
    candidates = dataclasses.replace(candidates, valid=torch.tensor([[[False, True]]]))
    before = state(1, 1, 1, 1, 0)
    slots = choose(candidates, before)
    assert slots.written.flatten().tolist() == [False, True]
    after = written(candidates, slots, before, column(0.5))
    for name in ("keys", "values", "strengths"):
        assert torch.equal(getattr(after, name)[..., 0, :1], getattr(before, name)[..., 0, :1])


def test_the_weight_is_one_with_the_gradient_of_a_softmax():
    candidates, before = told(near(2)[None], torch.tensor([0.9])), state(0.2, 0.3, 0.4, 0.5, 0.6)
    temperature, aversion = column(0.7).requires_grad_(), column(0.5).requires_grad_()
    weight = chosen_slots(candidates, before, column(0.5), temperature, aversion).weight
    assert weight.item() == 1

    def soft(temperature: Tensor, aversion: Tensor) -> Tensor:
        scores = (before.keys[0, 0] @ near(2) - aversion * before.strengths[0, 0]) / temperature
        return torch.softmax(scores.flatten(), 0)[2]

    found = torch.autograd.grad(weight.sum(), [temperature, aversion])
    wanted = torch.autograd.grad(soft(temperature, aversion), [temperature, aversion])
    torch.testing.assert_close(found, wanted)


def one_after_the_other(candidates: Candidates, slots, before: EpisodicState, gain: float) -> EpisodicState:
    keys, values, strengths = (getattr(before, name)[0, 0].clone() for name in ("keys", "values", "strengths"))
    for c in candidates.positions.flatten().argsort().tolist():
        if not slots.written[0, 0, c]:
            continue
        slot, key, value = slots.index[0, 0, c], candidates.keys[0, 0, c], candidates.values[0, 0, c]
        if slots.matched[0, 0, c]:
            strengths[slot] += gain * candidates.novelty[0, 0, c]
        else:
            strengths[slot] = gain * candidates.novelty[0, 0, c]
        keys[slot], values[slot] = key, value
    return EpisodicState(keys, values, strengths)


@pytest.mark.parametrize("positions", [[0, 1, 2, 3], [3, 0, 2, 1]])
def test_all_at_once_is_one_after_the_other_also_into_the_same_slot(positions):
    keys = torch.stack([near(2), unit(torch.ones(WIDTH).double()), unit(near(2) + 0.02), unit(near(2) - 0.02)])
    candidates = told(keys, torch.tensor([0.9, 0.8, 0.7, 0.6]), positions)
    before = state(0.3, 0.2, 0.6, 0.5, 0)
    slots = choose(candidates, before, 0.4)
    assert slots.index.flatten().tolist() == [2, 4, 2, 2]
    found, wanted = written(candidates, slots, before, column(0.4)), one_after_the_other(candidates, slots, before, 0.4)
    for name in ("keys", "values", "strengths"):
        torch.testing.assert_close(getattr(found, name)[0, 0], getattr(wanted, name), atol=1e-12, rtol=0)


def test_what_no_candidate_enters_keeps_its_bits():
    candidates, before = told(near(1)[None], torch.tensor([0.9])), state(1, 1, 1, 1, 0)
    after = written(candidates, choose(candidates, before), before, column(0.3))
    others = [0, 2, 3, 4]
    for name in ("keys", "values", "strengths"):
        assert torch.equal(getattr(after, name)[0, 0, others], getattr(before, name)[0, 0, others])
