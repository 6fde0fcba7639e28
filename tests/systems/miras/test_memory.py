"""The memory branch: every document alone, every token in its past, and steps that are joined by the carry."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.ops import MemoryLayer
from pipeline.parallel.topology import Topology
from pipeline.systems.miras.config import MemoryConfig
from pipeline.systems.miras.memory import MemoryBranch, MemoryCarry, MemoryHealth
from pipeline.systems.miras.rule_config import SwigluConfig

WIDTH, HEADS, DIM = 12, 2, 4
ALONE = Topology()
RULES = ("titans", "delta")
"""The exact rules, whose result does not depend on where chunks begin."""
FAMILY = (*RULES, "moneta", "yaad", "memora", "mlp", "swiglu")


def make(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object) -> MemoryBranch:
    """A branch whose every parameter is random, the output projection included."""
    options = {
        "heads": HEADS, "head_dim": DIM, "persistent": 3, "gate_rank": 5, "chunk": 8, "gradient_chunk": 8,
        "swiglu": SwigluConfig(gradient_chunk=8), **changes,
    }  # fmt: skip
    branch = MemoryBranch(WIDTH, MemoryConfig(layers=(0,), **options), norm_eps=1e-6)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.7)
    return branch.to(dtype)


def tokens(length: int, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ids(lengths: Sequence[int], batch: int = 2, first: int = 0) -> Tensor:
    """Segment ids of documents of these lengths, one after another."""
    row = torch.repeat_interleave(torch.arange(first, first + len(lengths)), torch.tensor(lengths))
    return row.expand(batch, -1).contiguous()


def run(
    branch: MemoryBranch, hidden: Tensor, segments: Tensor, carry: MemoryCarry | None = None
) -> tuple[Tensor, MemoryCarry, MemoryHealth]:
    return branch(hidden, segments, carry, ALONE)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_output_projection_of_zeros_adds_exactly_nothing(rule: str, dtype: torch.dtype) -> None:
    branch, hidden = make(rule=rule, dtype=dtype), tokens(20, dtype=dtype)
    added, _, _ = run(branch, hidden, ids([20]))
    assert added.shape == hidden.shape and added.dtype == dtype and added.any()
    with torch.no_grad():
        branch.o_proj.weight.zero_()
    added, _, _ = run(branch, hidden, ids([20]))
    assert torch.equal(added, torch.zeros_like(hidden))


@pytest.mark.parametrize("rule", FAMILY)
def test_all_parameters_learn(rule: str) -> None:
    branch = make(rule=rule)
    added, _, _ = run(branch, tokens(30), ids([17, 13]))
    added.square().sum().backward()
    silent = [name for name, p in branch.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_momentum_is_a_parameter_of_the_momentum_rule_alone() -> None:
    names = {rule: {name for name, _ in make(rule=rule).named_parameters()} for rule in RULES}
    assert names["titans"] - names["delta"] == {"eta_logits"}


def test_names_of_the_exact_rules_are_those_of_earlier_checkpoints() -> None:
    """A checkpoint older than the family loads, and its optimizer state finds its parameters."""
    assert [name for name, _ in make().named_parameters()] == [
        "eta_logits", "conv", "head_norm", "persistent_k", "persistent_v", "norm.weight", "q_proj.weight",
        "k_proj.weight", "v_proj.weight", "alpha_proj.weight", "alpha_proj.bias", "beta_proj.weight", "beta_proj.bias",
        "gate_down.weight", "gate_up.weight", "gate_up.bias", "o_proj.weight",
    ]  # fmt: skip


class TestConvolution:
    def expected(self, qkv: Tensor, kernel: Tensor, lengths: Sequence[int]) -> Tensor:
        """F.conv1d on each document by itself: qkv [batch, T, heads, channels], kernel [heads, taps, channels]."""
        weight = kernel.movedim(1, 2).flatten(0, 1).unsqueeze(1)
        taps, documents = kernel.shape[1], []
        for document in qkv.flatten(2).split(list(lengths), dim=1):
            padded = F.pad(document.movedim(1, 2), (taps - 1, 0))
            documents.append(F.conv1d(padded, weight, groups=weight.shape[0]).movedim(1, 2))
        return torch.cat(documents, dim=1).view_as(qkv)

    @pytest.mark.parametrize("lengths", [[21], [1, 20], [2, 1, 1, 3, 14], [1] * 21, [10, 11]], ids=str)
    @pytest.mark.parametrize("taps", [2, 3, 4, 7])
    def test_it_is_a_causal_convolution_of_each_document(self, lengths: list[int], taps: int) -> None:
        branch = make(conv=taps)
        qkv = torch.randn(2, 21, HEADS, 3 * DIM, dtype=torch.float64)
        mixed, _, _ = branch._convolve(qkv, ids(lengths), branch.empty_carry(qkv), branch.conv)
        assert_same(mixed, self.expected(qkv, branch.conv, lengths))

    @pytest.mark.parametrize("cuts", [[7, 7, 7], [1, 1, 19], [2, 18, 1], [1] * 21], ids=str)
    def test_it_goes_on_across_steps(self, cuts: list[int]) -> None:
        branch, lengths = make(), [3, 6, 12]
        qkv, segments = torch.randn(2, 21, HEADS, 3 * DIM, dtype=torch.float64), ids(lengths)
        carry, steps = branch.empty_carry(qkv), []
        for piece, part in zip(qkv.split(cuts, dim=1), segments.split(cuts, dim=1), strict=True):
            mixed, tail, tail_segments = branch._convolve(piece, part, carry, branch.conv)
            carry = carry._replace(tail=tail, tail_segments=tail_segments)
            steps.append(mixed)
        assert_same(torch.cat(steps, dim=1), self.expected(qkv, branch.conv, lengths))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lengths", [[1, 30], [16, 15], [3, 1, 9, 8, 10]], ids=str)
def test_packed_documents_equal_separate_runs(lengths: list[int], rule: str) -> None:
    """Outputs, and the gradients of hidden states and of every parameter."""
    branch, hidden = make(rule=rule), tokens(31).requires_grad_()
    cotangent = tokens(31, seed=2)
    parameters = [hidden, *branch.parameters()]
    packed, _, _ = run(branch, hidden, ids(lengths))
    alone = torch.cat([run(branch, piece, ids([piece.shape[1]]))[0] for piece in hidden.split(lengths, dim=1)], dim=1)
    assert_same(packed, alone)
    actual, expected = (torch.autograd.grad(output, parameters, cotangent) for output in (packed, alone))
    for gradient, reference in zip(actual, expected, strict=True):
        assert_same(gradient, reference)


def test_what_a_document_says_never_reaches_another() -> None:
    branch, lengths = make(), [9, 14, 8]
    hidden = tokens(31)
    changed = hidden.clone()
    changed[:, 9:23] = tokens(14, seed=5)
    (before, _, _), (after, _, _) = (run(branch, x, ids(lengths)) for x in (hidden, changed))
    assert torch.equal(before[:, :9], after[:, :9])
    assert_same(before[:, 23:], after[:, 23:])
    assert (before[:, 9:23] != after[:, 9:23]).any(dim=-1).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cuts", [[11, 10, 10], [1, 29, 1], [3, 2, 26]], ids=str)
@pytest.mark.parametrize("lengths", [[31], [5, 26], [11, 20], [4, 8, 19]], ids=str)
def test_a_document_over_three_steps_equals_one_go(lengths: list[int], cuts: list[int], rule: str) -> None:
    branch, hidden, segments = make(rule=rule), tokens(31), ids(lengths)
    whole, last, _ = run(branch, hidden, segments)
    carry, steps = None, []
    for piece, part in zip(hidden.split(cuts, dim=1), segments.split(cuts, dim=1), strict=True):
        added, carry, _ = run(branch, piece, part, carry)
        steps.append(added)
    assert_same(torch.cat(steps, dim=1), whole)
    for field, expected in zip(MemoryCarry._fields, last, strict=True):
        assert_same(getattr(carry, field), expected)


def test_streams_are_strangers_to_each_other() -> None:
    branch, hidden = make(), tokens(20, batch=3)
    segments = torch.stack([ids([20], batch=1)[0], ids([5, 15], batch=1)[0], ids([19, 1], batch=1)[0]])
    together, carry, _ = run(branch, hidden, segments)
    for row in range(3):
        alone, own, _ = run(branch, hidden[row : row + 1], segments[row : row + 1])
        assert_same(together[row : row + 1], alone)
        assert_same(carry.memory[row : row + 1], own.memory)


@pytest.mark.parametrize("rule", FAMILY)
def test_the_future_changes_nothing(rule: str) -> None:
    branch, hidden, segments = make(rule=rule), tokens(30), ids([12, 18])
    before, _, _ = run(branch, hidden, segments)
    for now in (0, 7, 8, 11, 12, 20, 28):
        changed = hidden.clone()
        changed[:, now + 1 :] = tokens(29 - now, seed=9)
        after, _, _ = run(branch, changed, segments)
        # Other numbers in a chunk may round differently, no more.
        assert_same(after[:, : now + 1], before[:, : now + 1])
        assert (after[:, now + 1 :] != before[:, now + 1 :]).any()


def test_the_past_of_a_document_reaches_its_end() -> None:
    branch, hidden = make(), tokens(30)
    changed = hidden.clone()
    changed[:, 0] = tokens(1, seed=9)[:, 0]
    (before, _, _), (after, _, _) = (run(branch, x, ids([30])) for x in (hidden, changed))
    assert (after[:, -1] - before[:, -1]).abs().max() > 1e-6


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_chunk_is_no_part_of_the_result(chunk: int) -> None:
    hidden, segments = tokens(31), ids([13, 18])
    assert_same(run(make(chunk=chunk), hidden, segments)[0], run(make(chunk=8), hidden, segments)[0])


def test_the_carry_holds_values_alone() -> None:
    _, carry, health = run(make(), tokens(9).requires_grad_(), ids([9]))
    assert not any(tensor.requires_grad for tensor in (*carry, *health))


def test_the_carry_is_single_precision_for_half_precision_models() -> None:
    branch, hidden = make(dtype=torch.bfloat16), tokens(9, dtype=torch.bfloat16)
    _, carry, _ = run(branch, hidden, ids([9]))
    assert (carry.memory.dtype, carry.momentum.dtype, carry.tail.dtype) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )
    again, _, _ = run(branch, hidden, ids([9]), carry)
    assert again.dtype == torch.bfloat16 and again.isfinite().all()


def test_shapes_of_the_carry() -> None:
    _, carry, _ = run(make(), tokens(9), ids([4, 5]))
    assert carry.memory.shape == carry.momentum.shape == (2, HEADS, DIM, DIM)
    assert carry.tail.shape == (2, 3, HEADS, 3 * DIM)
    assert carry.tail_segments.tolist() == [[1, 1, 1]] * 2


def test_a_stream_that_starts_has_no_tokens_before_it() -> None:
    _, carry, _ = run(make(), tokens(1), ids([1], first=7))
    assert carry.tail_segments.tolist() == [[-1, -1, 7]] * 2
    assert not carry.tail[:, :2].any() and carry.tail[:, 2].any()


@pytest.mark.parametrize("conv", [1, 2])
def test_a_convolution_of_one_tap_works_or_is_refused(conv: int) -> None:
    with contextlib.suppress(UserError):
        branch, hidden, segments = make(conv=conv), tokens(12), ids([5, 7])
        whole, _, _ = run(branch, hidden, segments)
        first, carry, _ = run(branch, hidden[:, :8], segments[:, :8])
        second, _, _ = run(branch, hidden[:, 8:], segments[:, 8:], carry)
        assert_same(torch.cat([first, second], dim=1), whole)


def test_persistent_pairs_are_read_and_never_written() -> None:
    """With the memory's own read-out silenced, what is left is softmax attention over the learned pairs."""
    branch, hidden = make(), tokens(10)
    with torch.no_grad():
        branch.head_norm.zero_()
    added, _, _ = run(branch, hidden, ids([10]))
    normed = branch.norm(hidden)
    qkv = torch.cat([p(normed).unflatten(-1, (HEADS, DIM)) for p in (branch.q_proj, branch.k_proj, branch.v_proj)], -1)
    mixed, _, _ = branch._convolve(qkv, ids([10]), branch.empty_carry(qkv), branch.conv)
    q = F.normalize(F.silu(mixed[..., :DIM]), dim=-1).movedim(1, 2)
    read = F.scaled_dot_product_attention(q, branch.persistent_k, branch.persistent_v, scale=1.0).movedim(1, 2)
    gate = torch.sigmoid(branch.gate_up(branch.gate_down(normed)))
    assert_same(added, branch.o_proj(read.flatten(2) * gate))


def test_without_persistent_pairs_there_is_the_memory_alone() -> None:
    branch = make(persistent=0)
    with torch.no_grad():
        branch.head_norm.zero_()
    added, _, _ = run(branch, tokens(10), ids([10]))
    assert not added.any()


@pytest.mark.parametrize("rule", FAMILY)
@pytest.mark.parametrize("push", [0.0, 30.0, -30.0])
def test_health_is_finite_and_averages_are_in_range(rule: str, push: float) -> None:
    branch = make(rule=rule, dtype=torch.float32)
    with torch.no_grad():
        branch.alpha_proj.bias.fill_(push)
        branch.beta_proj.bias.fill_(push)
        if branch.eta_logits is not None:
            branch.eta_logits.fill_(push)
    _, carry, health = run(branch, tokens(40, dtype=torch.float32), ids([40]))
    assert all(value.isfinite() for value in health)
    assert (int(health.states), int(health.gates)) == (2 * HEADS, 2 * 40 * HEADS)
    assert 0 <= health.alpha / health.gates <= 0.01 * (1 + 1e-6)
    assert 0 <= health.eta / health.gates < 1
    assert 0 <= health.theta / health.gates <= 0.9
    assert health.half_life / health.gates > 0
    norms = carry.memory.double().square().sum(dim=(-1, -2)).sqrt().sum()
    assert float(health.memory_norm) == pytest.approx(float(norms), rel=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_the_layer_for_other_models_is_the_branch_without_its_norm_and_its_persistent_pairs(rule: str) -> None:
    branch = make(rule=rule, persistent=0)
    layer = MemoryLayer(WIDTH, HEADS, DIM, rule=rule, gate_rank=5, chunk=8, dtype=torch.float64)  # type: ignore[arg-type]
    own = {name: value for name, value in branch.state_dict().items() if name in layer.state_dict()}
    assert set(branch.state_dict()) - set(own) == {"norm.weight", "persistent_k", "persistent_v"}
    layer.load_state_dict(own)
    hidden, segments = tokens(40), ids([25, 15])
    expected, carry, _ = run(branch, hidden, segments)
    y, state = layer(branch.norm(hidden), segments)
    assert_same(y, expected)
    assert state._fields == MemoryCarry._fields
    for part, other in zip(state, carry, strict=True):
        assert_same(part, other)


def test_a_long_repetitive_document_does_not_blow_the_memory_up() -> None:
    """The case that arbitrary gates diverge on: eight tokens again and again, large momentum and steps."""
    branch = make()
    with torch.no_grad():
        branch.alpha_proj.bias.fill_(-50)
        branch.alpha_proj.weight.zero_()
        branch.beta_proj.bias.fill_(50)
        branch.eta_logits.fill_(2.2)
    hidden = tokens(8, batch=1).repeat(1, 128, 1)
    _, short, _ = run(branch, hidden[:, :256], ids([256], batch=1))
    _, carry, _ = run(branch, hidden, ids([1024], batch=1))
    assert carry.memory.norm() < 2 * short.memory.norm()
