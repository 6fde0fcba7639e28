"""The whole model on one rank: against transformers, across documents and steps, and what learns."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Olmo2Config, Olmo2ForCausalLM

from pipeline.config import RunConfig
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import fill
from pipeline.system import IGNORED, Batch, Carry, StepContext, StepOutput
from pipeline.systems.miras import create
from pipeline.systems.miras.model import MirasModel
from pipeline.systems.miras.system import MirasSystem
from tests.launch.parity_main import LENGTH, VOCABULARY, base, randomise

CONTEXT = StepContext(Topology(), 0, "train", 1)


def built(
    config: RunConfig, *, noisy: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[MirasSystem, MirasModel]:
    system = create(config)
    assert isinstance(system, MirasSystem)
    model = system.build()
    assert isinstance(model, MirasModel)
    system.initialise(model, Topology())
    if noisy:
        fill(model, randomise)
    return system, model.to(dtype)


def batch(ids: Tensor, lengths: list[int]) -> Batch:
    """One row of documents of the given lengths, every token but a document's first counted."""
    segments = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])
    positions = torch.cat([torch.arange(length) for length in lengths])
    labels = torch.cat([ids[1:], torch.tensor([IGNORED])])
    labels[:-1][segments[1:] != segments[:-1]] = IGNORED
    return Batch(*(x.unsqueeze(0) for x in (ids, labels, segments, positions)), torch.tensor([0]))


def cut(whole: Batch, start: int, end: int) -> Batch:
    parts = (getattr(whole, name)[:, start:end] for name in ("input_ids", "labels", "segment_ids", "positions"))
    return Batch(*parts, whole.streams)


def run(system: MirasSystem, model: MirasModel, part: Batch, carry: Carry | None = None, **options: bool) -> StepOutput:
    return system.forward(model, part, carry or {}, dataclasses.replace(CONTEXT, options=options))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["full", "window"])
def test_without_memory_it_is_the_transformers_model(ids: Tensor, kind: str) -> None:
    config = base(kind)
    wide = dataclasses.replace(config.model.attention, window=LENGTH, sinks=0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=wide))
    system, model = built(config)
    found = run(system, model, batch(ids, [LENGTH]), memory=False).tokens["losses"][0, :-1]

    settings = Olmo2Config(**{**system.backbone.to_dict(), "attn_implementation": "eager"})
    plain = Olmo2ForCausalLM(settings)
    plain.load_state_dict(model.backbone.state_dict())
    logits = plain.to(torch.float64)(ids.unsqueeze(0)).logits[0]
    expected = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
    # transformers computes its norms and rotary angles in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_at_step_zero_the_memory_adds_nothing(ids: Tensor) -> None:
    system, model = built(base(), noisy=False)
    part = batch(ids, [30, LENGTH - 30])
    on, off = (run(system, model, part, memory=memory).tokens["losses"] for memory in (True, False))
    assert torch.equal(on, off)


@pytest.mark.parametrize("kind", ["full", "window"])
def test_packed_documents_equal_the_same_documents_apart(ids: Tensor, kind: str) -> None:
    lengths = [3, 25, 1, 19]
    system, model = built(base(kind))
    run(system, model, batch(ids, lengths)).sums["cross_entropy"].backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    losses = run(system, model, batch(ids, lengths)).tokens["losses"][0]
    model.zero_grad()
    apart = []
    for piece in ids.split(lengths):
        output = run(system, model, batch(piece, [len(piece)]))
        output.sums["cross_entropy"].backward()
        apart.append(output.tokens["losses"][0])
    torch.testing.assert_close(losses, torch.cat(apart), rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("cuts", [(16, 32), (5, 6), (10, 20), (1, 47)])
def test_a_document_split_over_three_steps_equals_one(ids: Tensor, cuts: tuple[int, int]) -> None:
    system, model = built(base())
    for lengths in ([LENGTH], [7, LENGTH - 7]):
        whole = batch(ids, lengths)
        expected = run(system, model, whole).tokens["losses"][0]
        carry: Carry = {}
        found = []
        for start, end in zip((0, *cuts), (*cuts, LENGTH), strict=True):
            output = run(system, model, cut(whole, start, end), carry)
            carry = output.carry
            found.append(output.tokens["losses"][0])
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-9, atol=1e-9)


def test_the_carry_is_constant(ids: Tensor) -> None:
    system, model = built(base())
    carry = run(system, model, batch(ids, [LENGTH])).carry
    assert carry and not any(entry.tensor.requires_grad for entry in carry.values())


def test_a_frozen_backbone_has_no_backward_pass_below_the_first_memory(ids: Tensor) -> None:
    config = base(trainable=False)
    system, model = built(config)
    (phase,) = system.phases(model)
    trained = {name for group in phase.groups for name in group.parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    differentiated: dict[int, bool] = {}
    for index, layer in enumerate(model.backbone.model.layers):
        layer.register_forward_hook(lambda _, __, out, index=index: differentiated.update({index: out.requires_grad}))
    run(system, model, batch(ids, [LENGTH])).sums["cross_entropy"].backward()
    # The block beside the first memory has a constant input too: only what comes after it is differentiated.
    assert differentiated == {0: False, 1: False, 2: True}
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)


def test_from_the_second_step_every_memory_parameter_learns(ids: Tensor) -> None:
    system, model = built(base(), noisy=False)
    optimizer = torch.optim.SGD(model.memory.parameters(), lr=0.1)
    learning = []
    for _ in range(2):
        optimizer.zero_grad()
        run(system, model, batch(ids, [20, LENGTH - 20])).sums["cross_entropy"].backward()
        learning.append({name for name, p in model.memory.named_parameters() if p.grad.abs().max() > 0})
        optimizer.step()
    first, second = learning
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in first} == {"o_proj"}
    assert second == {name for name, _ in model.memory.named_parameters()}


def test_logits_of_a_sequence_never_exist(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.ops.cross_entropy.LOGIT_BYTES", 4 * VOCABULARY * 8)
    seen = []
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, *rest: seen.append((x.shape, w.shape)) or real(x, w, *rest))
    system, model = built(base())
    run(system, model, batch(ids, [LENGTH]))
    heads = [x[0] for x, w in seen if w[0] == VOCABULARY]
    assert heads == [8] * (LENGTH // 8)


def test_recomputation_changes_nothing(ids: Tensor) -> None:
    gradients = []
    for recompute in (False, True):
        system, model = built(dataclasses.replace(base(), activation_checkpointing=recompute))
        run(system, model, batch(ids, [20, LENGTH - 20])).sums["cross_entropy"].backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-12, atol=1e-12, msg=name)


def test_weights_depend_on_seed_and_name_alone() -> None:
    first, second = (dict(built(base(), noisy=False)[1].named_parameters()) for _ in range(2))
    other = dict(built(dataclasses.replace(base(), seed=1), noisy=False)[1].named_parameters())
    config = base()
    memory = dataclasses.replace(config.model.memory, layers=(2,))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory))
    shallow = dict(built(config, noisy=False)[1].named_parameters())
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name])
        if name in shallow:
            assert torch.equal(parameter, shallow[name])
    assert not torch.equal(first["memory.1.q_proj.weight"], other["memory.1.q_proj.weight"])
