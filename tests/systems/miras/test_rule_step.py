"""Every rule a token at a time: the parallel pass is the reference, wherever chunks and rows stand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor

from pipeline.systems.miras.rule_config import MemoraConfig, MlpConfig, MonetaConfig, SwigluConfig, YaadConfig
from pipeline.systems.miras.rule_step import RuleStep, StepState, rule_step
from pipeline.systems.miras.rules import RULES, MemoryRule
from tests.systems.miras.test_rules import ALL, CHUNK, make, momentum_of, tokens

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{rule: (rule, {}) for rule in RULES},
    "titans, hard gate": ("titans", {"write_gate": "hard"}),
    "moneta, momentum": ("moneta", {"moneta": MonetaConfig(momentum=True, clip=0.3)}),
    "moneta, printed": ("moneta", {"moneta": MonetaConfig(p=1.5, q=2.5, link="printed", smooth="tanh")}),
    "yaad, momentum": ("yaad", {"yaad": YaadConfig(momentum=True, threshold="head")}),
    "yaad, norm": ("yaad", {"yaad": YaadConfig(form="norm")}),
    "memora, momentum": ("memora", {"memora": MemoraConfig(momentum=True)}),
    "mlp, no momentum": ("mlp", {"mlp": MlpConfig(momentum=False, hidden=2, clip=0.2)}),
    "swiglu, muon": ("swiglu", {"swiglu": SwigluConfig(gradient_chunk=CHUNK, muon=True)}),
    "swiglu, no momentum": ("swiglu", {"swiglu": SwigluConfig(gradient_chunk=CHUNK, momentum=False)}),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def made(variant: str) -> MemoryRule:
    rule, changes = VARIANTS[variant]
    return make(rule, **changes)


def parallel(rule: MemoryRule, x: list[Tensor], state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    with torch.no_grad():
        y, after, _ = rule(*x, momentum_of(rule), state, None, ALL)
    return y, after


def steps(stepper: RuleStep, x: list[Tensor], state: StepState) -> Tensor:
    """x [rows, tokens, ...] one token after another."""
    momentum = momentum_of(stepper.rule)
    reads = [stepper.step(*(part[:, t] for part in x), momentum, state) for t in range(x[0].shape[1])]
    return torch.stack(reads, dim=1)


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@every_variant
def test_steps_equal_the_parallel_pass_and_hand_its_state_back(variant: str) -> None:
    """Two chunks and a part of one; then to the border, where a parallel pass goes on."""
    rule, x = made(variant), tokens(length=4 * CHUNK)
    stepper = rule_step(rule)
    expected, end = parallel(rule, x, rule.empty_state(2, ALL, x[0]))
    head, rest = ([part[:, :CHUNK] for part in x], [part[:, CHUNK:] for part in x])
    first, after = parallel(rule, head, rule.empty_state(2, ALL, x[0]))
    given_state = [part.clone() for part in after]

    state = stepper.begin(after)
    places = {name: part.data_ptr() for name, part in state.tensors().items()}
    assert stepper.border(state).tolist() == [True, True]
    middle = steps(stepper, [part[:, : CHUNK + 3] for part in rest], state)
    assert stepper.border(state).tolist() == [rule.config.chunk_start is None] * 2
    to_border = steps(stepper, [part[:, CHUNK + 3 : 2 * CHUNK] for part in rest], state)
    assert stepper.border(state).tolist() == [True, True]
    last, after_last = parallel(rule, [part[:, 2 * CHUNK :] for part in rest], stepper.finish(state))

    equal(torch.cat([first, middle, to_border, last], dim=1), expected)
    for part, wanted in zip(after_last, end, strict=True):
        equal(part, wanted)
    assert places == {name: part.data_ptr() for name, part in state.tensors().items()}, "not in place"
    for part, wanted in zip(after, given_state, strict=True):
        assert torch.equal(part, wanted), "the parallel pass's state was changed"


@every_variant
@settings(max_examples=5)
@given(lengths=strategies.lists(strategies.integers(0, 2 * CHUNK + 1), min_size=2, max_size=3))
def test_rows_at_different_places_do_not_meet(variant: str, lengths: list[int]) -> None:
    rule = made(variant)
    stepper = rule_step(rule)
    apart, alone = [], []
    texts = [[part[:1] for part in tokens(length=length + CHUNK, seed=seed)] for seed, length in enumerate(lengths)]
    for text, length in zip(texts, lengths, strict=True):
        state = stepper.begin(rule.empty_state(1, ALL, text[0]))
        steps(stepper, [part[:, :length] for part in text], state) if length else None
        apart.append(state)
        alone.append(parallel(rule, text, rule.empty_state(1, ALL, text[0]))[0][:, length:])
    names = apart[0].tensors()
    joined = StepState(**{name: torch.cat([state.tensors()[name] for state in apart]) for name in names})
    ends = [torch.cat(parts) for parts in zip(*([p[:, -CHUNK:] for p in text] for text in texts), strict=True)]
    equal(steps(stepper, ends, joined), torch.cat(alone))


@every_variant
def test_a_chunk_that_is_closed_early_is_the_end_of_a_parallel_pass(variant: str) -> None:
    rule, x = made(variant), tokens(length=2 * CHUNK)
    stepper, cut = rule_step(rule), CHUNK - 3
    empty = rule.empty_state(2, ALL, x[0])
    first, after = parallel(rule, [part[:, :cut] for part in x], empty)
    second, end = parallel(rule, [part[:, cut : cut + CHUNK] for part in x], after)
    state = stepper.begin(empty)
    equal(steps(stepper, [part[:, :cut] for part in x], state), first)
    stepper.close(state)
    assert bool(stepper.border(state).all())
    equal(steps(stepper, [part[:, cut : cut + CHUNK] for part in x], state), second)
    for part, wanted in zip(stepper.finish(state), end, strict=True):
        equal(part, wanted)


@pytest.mark.parametrize("rule", ["yaad", "mlp", "swiglu"])
def test_one_row_closed_leaves_the_other_within_its_chunk(rule: str) -> None:
    made_rule, x = make(rule), tokens(length=CHUNK)
    stepper = rule_step(made_rule)
    empty = made_rule.empty_state(2, ALL, x[0])
    expected, _ = parallel(made_rule, x, empty)
    state = stepper.begin(empty)
    steps(stepper, [part[:, :3] for part in x], state)
    stepper.close(state, torch.tensor([True, False]))
    assert stepper.border(state).tolist() == [True, False]
    with pytest.raises(ValueError, match="within a chunk"):
        stepper.finish(state)
    again = steps(stepper, [part[:, 3:] for part in x], state)
    equal(again[1], expected[1, 3:])
    _, after = parallel(made_rule, [part[:1, :3] for part in x], (empty[0][:1], empty[1][:1]))
    closed, _ = parallel(made_rule, [part[:1, 3:] for part in x], after)
    equal(again[:1], closed)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_follow_the_parallel_pass(variant: str, dtype: torch.dtype) -> None:
    """States in float32, reads in the tokens' own dtype."""
    rule = made(variant).to(dtype)
    momentum = momentum_of(rule)
    x = [part.to(dtype) if index < 3 else part.float() for index, part in enumerate(tokens(length=2 * CHUNK))]
    empty = rule.empty_state(2, ALL, x[0])
    with torch.no_grad():
        expected, after, _ = rule(*x, None if momentum is None else momentum.float(), empty, None, ALL)
    stepper = rule_step(rule)
    state = stepper.begin(empty)
    eta = None if momentum is None else momentum.float()
    reads = torch.stack([stepper.step(*(p[:, t] for p in x), eta, state) for t in range(2 * CHUNK)], dim=1)
    assert reads.dtype == dtype and state.memory.dtype == torch.float32
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    assert float((reads.double() - expected.double()).norm() / expected.double().norm()) < bound
    assert float((state.memory - after[0]).norm() / after[0].norm()) < 1e-4


@pytest.mark.parametrize("rule", ["titans", "delta"])
def test_momentum_has_to_be_as_the_rule_has_it(rule: str) -> None:
    made_rule, x = make(rule), tokens(length=1)
    stepper = rule_step(made_rule)
    state = stepper.begin(made_rule.empty_state(2, ALL, x[0]))
    wrong = None if rule == "titans" else torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="momentum"):
        stepper.step(*(part[:, 0] for part in x), wrong, state)


def test_a_step_keeps_no_history() -> None:
    rule, x = make("mlp"), tokens(length=1)
    stepper = rule_step(rule)
    state = stepper.begin(rule.empty_state(2, ALL, x[0]))
    momentum = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    read = stepper.step(*(part[:, 0].requires_grad_() for part in x), momentum, state)
    assert not read.requires_grad and not any(part.requires_grad for part in state.tensors().values())
