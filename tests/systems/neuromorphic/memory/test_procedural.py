import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.systems.neuromorphic.memory.procedural import ROUTING_TEMPERATURE, ProceduralMemory
from pipeline.systems.neuromorphic.state import ProceduralState
from tests.systems.neuromorphic.memory import small
from tests.systems.neuromorphic.memory.small import ROWS, TOKENS, random

LAYERS = COLUMNS = 2
WIDTH = 6


def unit(x: Tensor) -> Tensor:
    return x / math.sqrt(float(x @ x) + 1e-8)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


@pytest.fixture(scope="module")
def memory() -> ProceduralMemory:
    return small.procedural()


@pytest.fixture(scope="module")
def spans() -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    shape = (LAYERS, COLUMNS, ROWS, TOKENS, WIDTH)
    counted = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    counted[1, :3] = False
    gate = random(ROWS, TOKENS, seed=10).sigmoid() * counted
    return list(random(*shape, seed=8)), list(random(*shape, seed=9)), gate, counted


def test_a_token_reads_strengths_times_matches_times_values(memory):
    state, x = small.procedural_state(memory), random(COLUMNS, ROWS, TOKENS, WIDTH)
    alive = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    alive[1, 3:] = False
    found = memory.read(1, x, state, alive)
    readout = memory.readout[1]
    for b in range(COLUMNS):
        for n in range(ROWS):
            for t in range(TOKENS):
                y = torch.zeros(WIDTH, dtype=torch.float64)
                for i in range(3):
                    match = state.keys[n, 1, b, i] @ unit(x[b, n, t])
                    y = y + alive[n, t] * state.strengths[n, 1, b, i] * match * state.values[n, 1, b, i]
                normed = F.layer_norm(y, (WIDTH,)) * readout.norm_weight[b] + readout.norm_bias[b]
                inner = F.gelu(normed @ readout.inner_weight[b] + readout.inner_bias[b])
                close(found[b, n, t], y + inner @ readout.outer_weight[b] + readout.outer_bias[b])


def eligible_by_token(memory, spans, state: ProceduralState, published: bool = False) -> tuple[Tensor, Tensor]:
    """One token after the other: e <- rho e + g w k."""
    inputs, outputs, gate, counted = spans
    keys, values = state.eligible_keys.clone(), state.eligible_values.clone()
    for n in range(ROWS):
        for la in range(LAYERS):
            for b in range(COLUMNS):
                instance = la * COLUMNS + b
                common = torch.zeros(WIDTH).double() if published else outputs[la][b, n, counted[n]].mean(0)
                for t in range(gate.shape[1]):
                    key = unit(inputs[la][b, n, t] @ memory.key.weight[instance] + memory.key.bias[instance])
                    value = (outputs[la][b, n, t] - common) @ memory.value.weight[instance]
                    value = value + memory.value.bias[instance]
                    logits = state.keys[n, la, b] @ key - 0.5 * state.strengths[n, la, b]
                    w = torch.ones(3).double() if published else torch.softmax(logits / ROUTING_TEMPERATURE, 0)
                    keys[n, la, b] = 0.95 * keys[n, la, b] + gate[n, t] * w[:, None] * key
                    values[n, la, b] = 0.95 * values[n, la, b] + gate[n, t] * w[:, None] * value
    return keys, values


@pytest.mark.parametrize("published", [False, True])
def test_eligibility_is_that_of_token_after_token(spans, published):
    memory = small.procedural(as_published=published)
    state = small.procedural_state(memory)
    found = memory.eligibility(*spans, state)
    keys, values = eligible_by_token(memory, spans, state, published)
    close(found.eligible_keys, keys)
    close(found.eligible_values, values)
    assert found.keys is state.keys
    assert found.strengths is state.strengths


def test_tokens_that_surprise_nobody_leave_nothing(memory, spans):
    inputs, outputs, gate, counted = spans
    empty = memory.initial_state(ROWS, torch.float64)
    found = memory.eligibility(inputs, outputs, torch.zeros_like(gate), counted, empty)
    assert found.eligible_keys.abs().max() == 0
    assert found.eligible_values.abs().max() == 0


def test_slots_are_eligible_for_different_tokens(memory, spans):
    """The prototype's slots all got the same."""
    empty = memory.initial_state(ROWS, torch.float64)
    found = F.normalize(memory.eligibility(*spans, empty).eligible_keys, dim=-1)
    cosines = (found @ found.transpose(-1, -2)).triu(diagonal=1)
    assert cosines.sum(dim=(-1, -2)).mean() / 3 < 0.5


def committed_by_hand(memory, state: ProceduralState, surprise: Tensor, n: int, la: int, b: int):
    """Keys, values, strengths, eligibility of keys after a commit, of one instance of one row."""
    network, i = memory.neuromodulator, la * COLUMNS + b
    keys, values, e_k, e_v = (
        getattr(state, name)[n, la, b] for name in ("keys", "values", "eligible_keys", "eligible_values")
    )
    a = 0.999 * state.strengths[n, la, b]
    norms = e_k.norm(dim=-1)
    scalars = torch.stack([norms.mean(), a.sum() / 4, surprise[n]])
    projected = e_k.mean(0) @ network.projection.weight[i] + network.projection.bias[i]
    hidden = (torch.cat([scalars, projected]) @ network.inner.weight[i] + network.inner.bias[i]).clamp(min=0)
    raw = hidden @ network.heads.weight[i] + network.heads.bias[i]
    p, g, lam = torch.sigmoid(raw[0]), torch.sigmoid(raw[2]), 0.999 + 0.001 * torch.sigmoid(raw[1])
    tau = 0.05 + 4.95 * torch.sigmoid(raw[3])
    logits = torch.stack([(keys[j] @ unit(e_k[j]) - 0.5 * a[j] + raw[4 + j]) / tau for j in range(3)])
    alpha = torch.softmax(logits, 0) * g * p * norms / (norms + 1)
    a = a * (1 - p * (1 - lam))
    new_keys, new_values = keys.clone(), values.clone()
    for j in range(3):
        old = (1 - alpha[j]) * min(a[j], 1)
        new_keys[j] = F.normalize(old * keys[j] + alpha[j] * unit(e_k[j]), dim=0)
        new_values[j] = F.normalize(old * values[j] + alpha[j] * unit(e_v[j]), dim=0)
    a = (a + alpha).clamp(0, 3)
    return new_keys, new_values, a * min(1, 4 / float(a.sum())), (1 - p) * e_k


@pytest.mark.parametrize("strength", [0.3, 3.0])
def test_a_commit_is_that_of_the_equations(memory, strength):
    state, surprise = small.procedural_state(memory, strength=strength), random(ROWS, seed=11).abs()
    found, _ = memory.commit(state, surprise)
    for n in range(ROWS):
        for la in range(LAYERS):
            for b in range(COLUMNS):
                keys, values, strengths, eligible = committed_by_hand(memory, state, surprise, n, la, b)
                # Unit rows here are exact, there u / sqrt(|u|^2 + 1e-8).
                torch.testing.assert_close(found.keys[n, la, b], keys, atol=1e-6, rtol=0)
                torch.testing.assert_close(found.values[n, la, b], values, atol=1e-6, rtol=0)
                close(found.strengths[n, la, b], strengths)
                close(found.eligible_keys[n, la, b], eligible)


def test_an_empty_slot_becomes_what_is_eligible():
    """The rows that it had count for nothing, however little is committed."""
    memory = small.procedural()
    with torch.no_grad():
        memory.neuromodulator.heads.weight.zero_()
        memory.neuromodulator.heads.bias[:, 2] = -10  # g
    state = small.procedural_state(memory)
    state = dataclasses.replace(state, strengths=torch.zeros_like(state.strengths))
    found, _ = memory.commit(state, torch.ones(ROWS, dtype=torch.float64))
    torch.testing.assert_close(found.keys, F.normalize(state.eligible_keys, dim=-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("head", [0, 2], ids=["p", "g"])
def test_without_commitment_or_gain_nothing_is_written(head):
    memory = small.procedural()
    with torch.no_grad():
        memory.neuromodulator.heads.weight[..., head] = 0
        memory.neuromodulator.heads.bias[..., head] = -1e4
    state = small.procedural_state(memory)
    found, _ = memory.commit(state, torch.ones(ROWS, dtype=torch.float64))
    assert torch.equal(found.keys, state.keys)
    assert torch.equal(found.values, state.values)
    assert (found.strengths <= state.strengths).all()


def test_strengths_stay_within_slot_and_budget_and_rows_are_unit(memory, spans):
    state = small.procedural_state(memory, strength=3.0)
    for _ in range(20):
        state, _ = memory.commit(memory.eligibility(*spans, state), torch.full((ROWS,), 5.0, dtype=torch.float64))
    assert state.strengths.max() <= 3
    assert state.strengths.sum(-1).max() <= 4 + 1e-9
    assert (state.strengths.sum(-1).max() - 4).abs() < 0.2
    torch.testing.assert_close(state.keys.norm(dim=-1), torch.ones_like(state.strengths), atol=1e-6, rtol=0)


def test_gradients_of_what_is_read_later_reach_every_parameter(memory, spans):
    state = small.procedural_state(memory)
    for _ in range(2):
        state, _ = memory.commit(memory.eligibility(*spans, state), torch.ones(ROWS, dtype=torch.float64))
    alive = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    total = sum((memory.read(la, spans[0][la], state, alive) ** 2).sum() for la in range(LAYERS))
    for name, gradient in zip(
        dict(memory.named_parameters()),
        torch.autograd.grad(total, list(memory.parameters()), allow_unused=True),
        strict=True,
    ):
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name


def test_decay_lets_gradients_through_to_earlier_strengths():
    """Two spans in which nobody is surprised: a later read depends on the first strengths by (decay (1 - p (1 - l)))^2.
    The prototype cut the gradient at each span."""
    memory = small.procedural()
    with torch.no_grad():
        memory.neuromodulator.heads.weight.zero_()  # p and lambda are those of its bias, whatever it is told
    bias = memory.neuromodulator.heads.bias.detach()
    p, retention = torch.sigmoid(bias[:, 0]), 0.999 + 0.001 * torch.sigmoid(bias[:, 1])
    begun = small.procedural_state(memory, strength=0.1)
    nothing = torch.zeros_like(begun.eligible_keys)
    strengths = begun.strengths.requires_grad_()
    state = dataclasses.replace(begun, eligible_keys=nothing, eligible_values=nothing)
    for _ in range(2):
        state, _ = memory.commit(state, torch.zeros(ROWS, dtype=torch.float64))
    factor = (0.999 * (1 - p * (1 - retention))) ** 2
    factors = factor.reshape(LAYERS, COLUMNS, 1).expand_as(strengths)
    torch.testing.assert_close(state.strengths, factors * strengths, atol=1e-7, rtol=1e-7)
    weights = random(*strengths.shape, seed=5)
    (found,) = torch.autograd.grad((weights * state.strengths).sum(), strengths)
    torch.testing.assert_close(found, weights * factors, atol=1e-7, rtol=1e-7)


def test_the_penalty_is_what_exceeds_nine_tenths_of_the_budget(memory):
    state = small.procedural_state(memory)
    strengths = torch.zeros_like(state.strengths)
    strengths[0, 0, 1] = torch.tensor([2.0, 1.0, 0.9])
    found = memory.penalty(dataclasses.replace(state, strengths=strengths))
    assert float(found) == pytest.approx((3.9 - 3.6) / ROWS)


def test_summaries_and_statistics_are_means_of_what_is_there(memory):
    state = small.procedural_state(memory)
    empty = dataclasses.replace(state, strengths=torch.zeros_like(state.strengths))
    assert memory.summary(empty).abs().max() == 0
    wanted = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    for la in range(LAYERS):
        for b in range(COLUMNS):
            a = state.strengths[:, la, b]
            wanted += torch.einsum("nr,nrh->nh", a, state.values[:, la, b]) / a.sum(-1, keepdim=True) / 4
    close(memory.summary(state), wanted)
    found = memory.statistics(state)
    close(found["a_sum"], state.strengths.sum(-1).mean(0))
    close(found["elig_norm"], state.eligible_keys.norm(dim=-1).mean(-1).mean(0))
    assert (memory.statistics(empty)["nonzero"] == 0).all()
