import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.systems.neuromorphic.columns import ColumnLinear
from pipeline.systems.neuromorphic.memory.candidates import Candidates
from pipeline.systems.neuromorphic.memory.episodic import EpisodicMemory
from pipeline.systems.neuromorphic.state import EpisodicState
from tests.systems.neuromorphic.memory import small
from tests.systems.neuromorphic.memory.small import ROWS, TOKENS, random

COLUMNS, WIDTH, INNER, E = 2, 12, 6, 4
ALIVE = torch.ones(ROWS, TOKENS, dtype=torch.bool)


def unit(x: Tensor) -> Tensor:
    return x / (x @ x + 1e-8).sqrt()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


@pytest.fixture(scope="module")
def memory() -> EpisodicMemory:
    return small.episodic()


X, Y_WM = random(ROWS, TOKENS, WIDTH, seed=20), random(ROWS, TOKENS, WIDTH, seed=21)
OUTPUTS = random(COLUMNS, ROWS, TOKENS, INNER, seed=22)
SURPRISE = 6 * random(ROWS, TOKENS, seed=23).sigmoid()


def of_column(module, b: int, x: Tensor) -> Tensor:
    """A map of column b, of an input that columns share or of its own."""
    weight = module.weight[b] if isinstance(module, ColumnLinear) else module.weight[b].T
    return x @ weight + module.bias[b]


def candidates_of(memory, state: EpisodicState, valid: Tensor = ALIVE) -> Candidates:
    return memory.candidates(X, Y_WM, OUTPUTS, SURPRISE, valid, state)


def read_by_hand(memory, state: EpisodicState, b: int, n: int, t: int, alive: bool = True) -> Tensor:
    both = torch.cat([X[n, t], Y_WM[n, t]])
    query, context = unit(of_column(memory.query, b, both)), of_column(memory.context, b, X[n, t])
    there = [m for m in range(memory.episodes) if state.strengths[n, b, m] > 0 and alive]
    matches = {m: 2 * query @ state.keys[n, b, m] + state.strengths[n, b, m].log() for m in there}
    y = torch.zeros(E, dtype=torch.float64)
    best = sorted(matches, key=lambda m: -matches[m].item())[: memory.retrieved]
    if best:
        logits = torch.stack([matches[m] + context @ state.values[n, b, m] / 2 for m in best])
        y = torch.softmax(logits, 0) @ state.values[n, b, best]
    readout = memory.readout
    normed = F.layer_norm(y, (E,)) * readout.norm_weight[b] + readout.norm_bias[b]
    inner = F.gelu(normed @ readout.inner_weight[b] + readout.inner_bias[b])
    return of_column(memory.output, b, y + inner @ readout.outer_weight[b] + readout.outer_bias[b])


@pytest.mark.parametrize("there", [0, 2, 5])
def test_a_token_reads_the_episodes_that_match_best(memory, there):
    state = small.episodic_state(memory, there)
    alive = ALIVE.clone()
    alive[1, 4:] = False
    found = memory.read(X, Y_WM, state, alive)
    for b in range(COLUMNS):
        for n in range(ROWS):
            for t in range(TOKENS):
                close(found[b, n, t], read_by_hand(memory, state, b, n, t, bool(alive[n, t])))


def test_strengths_decide_between_episodes_of_one_key():
    memory = small.episodic()
    with torch.no_grad():
        memory.context.weight.zero_()
        memory.context.bias.zero_()
    state = small.episodic_state(memory, 2)
    same = state.keys.clone()
    same[..., 1, :] = same[..., 0, :]
    means = []
    for weak in (1.0, 1e-3, 1e-9):
        strengths = state.strengths.clone()
        strengths[..., 0], strengths[..., 1] = 1.0, weak
        means.append(memory.read(X, Y_WM, EpisodicState(same, state.values, strengths), ALIVE))
    strengths[..., 1] = 0
    alone = memory.read(X, Y_WM, EpisodicState(same, state.values, strengths), ALIVE)
    errors = [(mean - alone).abs().max().item() for mean in means]
    assert errors[0] > 10 * errors[1] > 1e5 * errors[2] > 0


def test_of_episodes_that_match_alike_no_more_are_read_than_are_retrieved():
    memory = small.episodic().bfloat16()
    with torch.no_grad():
        memory.context.weight.zero_()
        memory.context.bias.zero_()
    state = small.episodic_state(memory, memory.episodes)
    same = state.keys[..., :1, :].expand_as(state.keys).float()
    one = torch.zeros_like(state.values).float()
    one[..., 0, 0] = 1
    weights = []
    for m in range(memory.episodes):
        # What is read of episode m: its weight, in the first number of what goes into the read-out.
        alone = EpisodicState(same, one.roll(m, -2), torch.ones_like(state.strengths).float())
        seen = []
        handle = memory.readout.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        memory.read(X.bfloat16(), Y_WM.bfloat16(), alone, ALIVE)
        handle.remove()
        weights.append(seen[0][..., 0])
    found = torch.stack(weights, -1).float()
    assert ((found > 0).sum(-1) == memory.retrieved).all()
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), atol=0.01, rtol=0)


@pytest.mark.parametrize("published", [False, True])
def test_keys_and_values_are_of_the_most_novel_tokens(published):
    memory = small.episodic(as_published=published)
    state = small.episodic_state(memory)
    found = candidates_of(memory, state)
    common = torch.zeros_like(OUTPUTS[..., 0, :]) if published else OUTPUTS.mean(2)
    for n in range(ROWS):
        for b in range(COLUMNS):
            keys, novelty = [], []
            for t in range(TOKENS):
                both = torch.cat([X[n, t], Y_WM[n, t]])
                keys.append(unit(of_column(memory.key, b, both)))
                w = torch.sigmoid(of_column(memory.novelty, b, both)[0])
                nearest = max(0.0, *((keys[-1] @ state.keys[n, b, m]).item() for m in range(3)))
                s = SURPRISE[n, t]
                novelty.append(w * s / (s + math.log(20)) + (1 - w) * (1 - nearest))
            order = torch.stack(novelty).argsort(descending=True)[:4]
            assert found.positions[n, b].tolist() == order.tolist()
            close(found.novelty[n, b], torch.stack(novelty)[order])
            close(found.keys[n, b], torch.stack(keys)[order])
            for c, t in enumerate(order):
                close(found.values[n, b, c], of_column(memory.value, b, OUTPUTS[b, n, t] - common[b, n]))
            close(found.mean_key[n, b], torch.stack(keys).mean(0))
            close(found.mean_novelty[n, b], torch.stack(novelty).mean())


def test_without_episodes_novelty_is_surprise_alone(memory):
    found = candidates_of(memory, small.episodic_state(memory, 0))
    s = SURPRISE.gather(1, found.positions[:, 0])
    close(found.novelty[:, 0], s / (s + math.log(20)))


def test_novelty_tells_high_surprises_apart(memory):
    """The prototype's was 1 for nearly all tokens, so that which were written was chance."""
    found = memory.candidates(X, Y_WM, OUTPUTS, SURPRISE + 6, ALIVE, small.episodic_state(memory, 0)).novelty
    assert found.max() < 1
    assert (found.diff(dim=-1) < -1e-6).all()


def test_tokens_that_do_not_count_are_no_candidates(memory):
    valid = ALIVE.clone()
    valid[0, :5] = False  # two are left
    found = candidates_of(memory, small.episodic_state(memory), valid)
    assert found.valid[0].sum(-1).tolist() == [2, 2]
    assert (found.positions[0][found.valid[0]] >= 5).all()
    assert found.valid[1].all()
    keys = F.normalize(memory.key(torch.cat([X, Y_WM], -1)), dim=-1)[:, 0, 5:].mean(1)
    torch.testing.assert_close(found.mean_key[0], keys, atol=1e-7, rtol=0)


def test_a_span_of_no_tokens_that_count_writes_nothing(memory):
    state = small.episodic_state(memory)
    found = candidates_of(memory, state, torch.zeros_like(ALIVE))
    after, _ = memory.write(found, state, torch.zeros(ROWS, dtype=torch.float64))
    assert torch.equal(after.keys, state.keys)
    assert torch.equal(after.values, state.values)
    assert (after.strengths <= state.strengths).all()


def test_a_write_decays_strengths_and_keeps_the_budget(memory):
    state = small.episodic_state(memory, 6)
    strong = dataclasses.replace(state, strengths=3 + state.strengths)
    found = candidates_of(memory, strong)
    after, measures = memory.write(found, strong, torch.ones(ROWS, dtype=torch.float64))
    close(after.strengths, torch.full_like(after.strengths, 8 / 6))  # all at 3, then rescaled
    weak = dataclasses.replace(state, strengths=0.1 * state.strengths + 0.01)
    nothing = dataclasses.replace(found, valid=torch.zeros_like(found.valid))
    after, measures = memory.write(nothing, weak, torch.ones(ROWS, dtype=torch.float64))
    ratio = after.strengths / weak.strengths
    close(ratio.mean((0, 2)), measures["decay"])
    assert (ratio > 0.99).all()
    assert (ratio < 0.9999).all()


def test_strengths_written_are_gain_times_novelty(memory):
    state = small.episodic_state(memory, 0)
    found = candidates_of(memory, state)
    after, measures = memory.write(found, state, torch.ones(ROWS, dtype=torch.float64))
    for b in range(COLUMNS):
        written = after.strengths[:, b, :4]
        gain = (written / found.novelty[:, b]).mean(-1, keepdim=True)
        close(written, gain * found.novelty[:, b])
        assert float(gain.mean()) == pytest.approx(float(measures["gain"][b] * measures["decay"][b]), rel=0.01)
    assert measures["written"].tolist() == [4, 4]
    close(after.keys[:, :, :4], found.keys)
    close(after.values[:, :, :4], found.values)


def test_gradients_of_what_is_read_later_reach_every_parameter(memory):
    state = small.episodic_state(memory, 2)
    for _ in range(2):
        state, _ = memory.write(candidates_of(memory, state), state, torch.ones(ROWS, dtype=torch.float64))
    total = memory.read(X, Y_WM, state, ALIVE).square().sum()
    gradients = torch.autograd.grad(total, list(memory.parameters()), allow_unused=True)
    for name, gradient in zip(dict(memory.named_parameters()), gradients, strict=True):
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name


def test_penalty_summary_and_statistics(memory):
    state = small.episodic_state(memory, 3)
    heavy = dataclasses.replace(state, strengths=torch.zeros_like(state.strengths))
    assert memory.summary(heavy).abs().max() == 0
    heavy.strengths[0, 1, :3] = torch.tensor([3.0, 3.0, 1.5])
    assert float(memory.penalty(heavy)) == pytest.approx((7.5 - 7.2) / ROWS)
    weights = state.strengths / state.strengths.sum(-1, keepdim=True)
    close(memory.summary(state), (weights.unsqueeze(-1) * state.values).sum(-2).mean(1))
    found = memory.statistics(state)
    close(found["S_max"], state.strengths.amax(-1).mean(0))
    assert found["nonzero"].tolist() == [0.5, 0.5]


def test_bfloat16_weights_leave_the_state_in_float32():
    memory = small.episodic().bfloat16()
    state = small.episodic_state(memory)
    state = EpisodicState(state.keys.float(), state.values.float(), state.strengths.float())
    x, y, outputs = X.bfloat16(), Y_WM.bfloat16(), OUTPUTS.bfloat16()
    read = memory.read(x, y, state, ALIVE)
    after, _ = memory.write(memory.candidates(x, y, outputs, SURPRISE.float(), ALIVE, state), state, torch.ones(ROWS))
    assert read.dtype == torch.bfloat16
    assert {after.keys.dtype, after.values.dtype, after.strengths.dtype} == {torch.float32}
    assert memory.initial_state(2).keys.dtype == torch.float32


def test_decay_lets_gradients_through_to_earlier_strengths():
    """Two spans without candidates: a later read depends on the first strengths by decay^2."""
    memory = small.episodic()
    with torch.no_grad():
        memory.neuromodulator.heads.weight.zero_()  # its outputs are those of its bias, whatever it is told
    decay = 0.99 + 0.0099 * torch.sigmoid(memory.neuromodulator.heads.bias[:, 3].detach())
    state = small.episodic_state(memory)
    begun = state.strengths.requires_grad_()
    for _ in range(2):
        candidates = candidates_of(memory, state, torch.zeros_like(ALIVE))
        state, _ = memory.write(candidates, state, torch.zeros(ROWS, dtype=torch.float64))
    factors = (decay**2)[:, None].expand_as(begun)
    close(state.strengths, factors * begun)
    weights = random(*begun.shape, seed=6)
    (found,) = torch.autograd.grad((weights * state.strengths).sum(), begun)
    there = begun.detach() > 0
    close(found[there], (weights * factors)[there])
