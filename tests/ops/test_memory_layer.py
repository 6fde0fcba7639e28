"""The layer for a model of one's own: in a plain PyTorch loop, over packed documents, in pieces, and as it is saved."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.ops import MemoryLayer, MemoryState
from pipeline.ops.gates import MAX_FORGET, MAX_MOMENTUM, STEP_MARGIN

ROOT = Path(__file__).parents[2]
WIDTH = 12
RULES = ("titans", "delta")
rules = pytest.mark.parametrize("rule", RULES)


def make(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> MemoryLayer:
    """A layer whose every parameter is random, the output projection included."""
    layer = MemoryLayer(WIDTH, **{"heads": 2, "head_dim": 4, "value_dim": 6, "gate_rank": 3, "chunk": 8, **options})
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.7)
    return layer.to(dtype)


def tokens(length: int, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ids(*lengths: int, batch: int = 2, first: int = 0) -> Tensor:
    row = torch.repeat_interleave(torch.arange(first, first + len(lengths)), torch.tensor(lengths))
    return row.expand(batch, -1)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


KEYS, VALUES, PAIRS, GAP = 16, 16, 4, 16


def recall(rows: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Key-value pairs, filler, then the keys again in another order; a label per key is the value that it had."""
    keys = torch.rand(rows, KEYS, generator=rng).argsort(1)[:, :PAIRS]
    values = torch.randint(VALUES, (rows, PAIRS), generator=rng)
    order = torch.rand(rows, PAIRS, generator=rng).argsort(1)
    stored = torch.stack([keys, KEYS + values], dim=-1).flatten(1)
    filler = torch.full((rows, GAP), KEYS + VALUES)
    labels = torch.full((rows, 3 * PAIRS + GAP), -100)
    labels[:, -PAIRS:] = values.gather(1, order)
    return torch.cat([stored, filler, keys.gather(1, order)], dim=1), labels


class Model(nn.Module):
    """The smallest model that can recall: it has no attention."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(KEYS + VALUES + 1, 32)
        self.norm = nn.RMSNorm(32)
        self.memory = MemoryLayer(32, heads=2, head_dim=32, gate_rank=8, rule=rule)  # type: ignore[arg-type]
        self.head = nn.Linear(32, VALUES)

    def loss(self, inputs: Tensor, labels: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        x = self.embed(inputs)
        x = x + self.memory(self.norm(x), segment_ids)[0]
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=-100)


@rules
def test_a_plain_training_loop_learns_what_only_a_memory_can_know(rule: str) -> None:
    torch.manual_seed(0)
    model, rng = Model(rule), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model.loss(*recall(32, rng))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inputs, labels = recall(256, rng)
    chance = math.log(VALUES)
    with torch.no_grad():
        assert model.loss(inputs, labels) < 0.2 * chance
        # Every token a document of its own: nothing is remembered, and no value can be known.
        assert model.loss(inputs, labels, torch.arange(inputs.shape[1]).expand_as(inputs)) > 0.9 * chance


@settings(max_examples=25, deadline=None)
@given(
    rule=st.sampled_from(RULES), lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), seed=st.integers(0, 5)
)
def test_packed_documents_are_as_if_each_were_alone(rule: str, lengths: list[int], seed: int) -> None:
    layer, x = make(seed, rule=rule), tokens(sum(lengths), seed=seed)
    packed, state = layer(x, ids(*lengths))
    alone = [layer(part) for part in x.split(lengths, dim=1)]
    assert_same(packed, torch.cat([y for y, _ in alone], dim=1))
    for part, expected in zip(state[:2], alone[-1][1][:2], strict=True):
        assert_same(part, expected)


@settings(max_examples=25, deadline=None)
@given(rule=st.sampled_from(RULES), cuts=st.lists(st.integers(1, 29), max_size=3, unique=True), seed=st.integers(0, 5))
def test_pieces_that_carry_the_state_are_the_whole_with_its_gradients(rule: str, cuts: list[int], seed: int) -> None:
    """Documents begin at 11 and 20, in mid-piece, at a cut, or just before one."""
    layer, segment_ids = make(seed, rule=rule), ids(11, 9, 10)
    x = tokens(30, seed=seed).requires_grad_()
    whole, last = layer(x, segment_ids)
    (expected,) = torch.autograd.grad(whole.square().sum(), x)

    state, pieces = None, []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 30], strict=True):
        y, state = layer(x[:, start:end], segment_ids[:, start:end], state)
        pieces.append(y)
    joined = torch.cat(pieces, dim=1)
    assert_same(joined, whole)
    for part, other in zip(state, last, strict=True):
        assert_same(part, other)
    assert_same(torch.autograd.grad(joined.square().sum(), x)[0], expected)


def test_a_document_that_begins_with_a_piece_finds_nothing_of_the_one_before() -> None:
    layer, x = make(), tokens(20)
    _, state = layer(x[:, :10])
    y, _ = layer(x[:, 10:], ids(10, first=1), state)
    assert_same(y, layer(x[:, 10:])[0])
    # Row by row: the first goes on, the second begins anew.
    mixed, _ = layer(x[:, 10:], torch.stack([torch.zeros(10), torch.ones(10)]).long(), state)
    assert_same(mixed[0], layer(x)[0][0, 10:])
    assert_same(mixed[1], layer(x[:, 10:])[0][1])


def test_a_detached_state_cuts_the_gradient_and_keeps_the_values() -> None:
    layer, x = make(), tokens(10).requires_grad_()
    _, state = layer(x)
    assert all(part.grad_fn is None for part in state.detach())
    assert_same(layer(tokens(5), None, state.detach())[0], layer(tokens(5), None, state)[0])
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(layer(tokens(5), None, state.detach())[0].sum(), x)


@rules
def test_no_token_sees_a_later_one(rule: str) -> None:
    layer, x = make(rule=rule), tokens(20)
    changed = x.clone()
    changed[:, 12:] += 1
    assert torch.equal(layer(x)[0][:, :12], layer(changed)[0][:, :12])


def test_it_starts_as_nothing_and_every_parameter_learns() -> None:
    torch.manual_seed(0)
    layer = MemoryLayer(WIDTH, heads=2, head_dim=4)
    y, _ = layer(tokens(16, dtype=torch.float32))
    assert not y.any()
    nn.init.normal_(layer.o_proj.weight)
    layer(tokens(16, dtype=torch.float32))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


@rules
def test_initial_gates_are_spread_over_the_heads(rule: str) -> None:
    layer = MemoryLayer(WIDTH, heads=4, head_dim=4, rule=rule)  # type: ignore[arg-type]
    gates = layer.gates(torch.zeros(1, 1, WIDTH))
    assert gates.theta.flatten()[[0, -1]].tolist() == pytest.approx([0.5, 0.002], rel=1e-4)
    half_lives = math.log(2) / -torch.log1p(-gates.alpha.double()).flatten()
    assert half_lives[[0, -1]].tolist() == pytest.approx([1e3, 1e6], rel=1e-2)
    assert gates.eta.flatten().tolist() == pytest.approx([0.1 if rule == "titans" else 0.0] * 4)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.1, 100), seed=st.integers(0, 9))
def test_no_weights_take_the_gates_out_of_the_stable_region_or_let_the_memory_grow(scale: float, seed: int) -> None:
    layer, x = make(seed, dtype=torch.float32), tokens(8, seed=seed, dtype=torch.float32) * scale
    with torch.no_grad():
        gates = layer.gates(x)
        assert (gates.alpha <= torch.tensor(MAX_FORGET)).all() and (gates.eta <= torch.tensor(MAX_MOMENTUM)).all()
        assert (gates.theta <= STEP_MARGIN * (1 - gates.eta) ** 2).all()
        # Keys that come again are what arbitrary gates diverge on.
        short = layer(x.repeat(1, 16, 1))[1].memory.norm()
        assert layer(x.repeat(1, 64, 1))[1].memory.norm() < 3 * short + 1


def test_zero_vectors_as_padding_give_no_exploding_gradient() -> None:
    layer, x = make(dtype=torch.float32), tokens(12, dtype=torch.float32)
    x[:, 4:] = 0
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0].sum(), x)
    # As steep as the two norms let it be; where a zero vector is stretched to unit length it is 1e15.
    assert gradient.isfinite().all() and gradient.abs().max() < 1e8


def test_under_autocast_tokens_are_bfloat16_and_gates_and_state_float32() -> None:
    layer = make(dtype=torch.float32, heads=2, head_dim=32, value_dim=32)
    nn.init.normal_(layer.o_proj.weight, std=0.1)
    x = tokens(40, dtype=torch.float32)
    full, state = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half, half_state = layer(x)
        gates = layer.gates(x)
    assert half.dtype == half_state.tail.dtype == torch.bfloat16
    assert gates.alpha.dtype == half_state.memory.dtype == half_state.momentum.dtype == torch.float32
    assert torch.equal(gates.alpha, layer.gates(x).alpha)
    assert (half - full).norm() < 0.03 * full.norm()
    assert (half_state.memory - state.memory).norm() < 0.03 * state.memory.norm()
    half.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_a_bfloat16_layer_keeps_its_state_in_float32() -> None:
    y, state = make(dtype=torch.bfloat16)(tokens(8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and state.memory.dtype == torch.float32


@rules
def test_a_state_dict_makes_the_same_layer(rule: str) -> None:
    layer, file = make(1, rule=rule), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make(2, rule=rule)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(layer(tokens(20))[0], other(tokens(20))[0])


def test_it_compiles_into_one_graph() -> None:
    layer, x = make(), tokens(20)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_same(compiled(x, ids(12, 8))[0], layer(x, ids(12, 8))[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rule": "mlp"}, "rule is 'mlp'; expected 'titans' or 'delta'"),
        ({"heads": 0}, "heads is 0; expected 1 or more"),
        ({"conv": 1}, "conv is 1; expected 2 or more"),
        ({"momentum": 1.0}, "momentum is 1.0; expected a value between 0 and 0.99"),
        ({"half_life": (0, 1)}, r"half_life is \(0, 1\); expected two values above 0"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryLayer(WIDTH, **options)


def test_wrong_arguments_are_named() -> None:
    layer = make()
    with pytest.raises(ValueError, match=r"x has shape \[2, 5, 3\]; expected \[batch, sequence, 12\]"):
        layer(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match=r"segment_ids has shape \[2, 4\]; expected \[2, 5\]"):
        layer(tokens(5), ids(4))
    _, state = layer(tokens(5))
    with pytest.raises(ValueError, match=r"state\.memory has shape \[2, 2, 4, 6\]; expected \[3, 2, 4, 6\]"):
        layer(tokens(5, batch=3), None, state)
    with pytest.raises(ValueError, match=r"state\.tail has shape"):
        layer(tokens(5), None, MemoryState(state.memory, state.momentum, state.tail[:, 1:], state.tail_segments))


@pytest.mark.parametrize("page", ["README.md", "docs/use_the_op.md"])
def test_the_examples_of_the_pages_run(page: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)
