"""The whole model on one rank: against transformers, across documents and steps, and what learns."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Olmo2Config, Olmo2ForCausalLM

from tests.launch.parity_main import LENGTH, VOCABULARY, base
from tests.systems.miras.harness import (
    assert_memory_adds_nothing,
    assert_packed_equals_apart,
    assert_recomputation_changes_nothing,
    assert_steps_equal_one,
    batch,
    built,
    differentiated_blocks,
    learning_in_two_steps,
    run,
    tokens,
)


@pytest.fixture
def ids() -> Tensor:
    return tokens()


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
    assert_memory_adds_nothing(system, model, batch(ids, [30, LENGTH - 30]))


@pytest.mark.parametrize("kind", ["full", "window"])
def test_packed_documents_equal_the_same_documents_apart(ids: Tensor, kind: str) -> None:
    assert_packed_equals_apart(base(kind), ids, [3, 25, 1, 19])


@pytest.mark.parametrize("cuts", [(16, 32), (5, 6), (10, 20), (1, 47)])
def test_a_document_split_over_three_steps_equals_one(ids: Tensor, cuts: tuple[int, int]) -> None:
    system, model = built(base())
    for lengths in ([LENGTH], [7, LENGTH - 7]):
        assert_steps_equal_one(system, model, batch(ids, lengths), cuts)


def test_the_carry_is_constant(ids: Tensor) -> None:
    system, model = built(base())
    carry = run(system, model, batch(ids, [LENGTH])).carry
    assert carry and not any(entry.tensor.requires_grad for entry in carry.values())


@pytest.mark.parametrize("attachment", ["residual", "mac"])
def test_the_carry_keeps_nothing_alive_but_its_own_values(ids: Tensor, attachment: str) -> None:
    """A view would keep what it was cut from, such as a whole step's queries, keys and values, until the next step."""
    config = base()
    memory = dataclasses.replace(config.model.memory, attachment=attachment)
    system, model = built(dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory)))
    for name, entry in run(system, model, batch(ids, [LENGTH])).carry.items():
        assert entry.tensor.untyped_storage().nbytes() == entry.tensor.nbytes, name


def test_a_frozen_backbone_has_no_backward_pass_below_the_first_memory(ids: Tensor) -> None:
    config = base(trainable=False)
    system, model = built(config)
    (phase,) = system.phases(model)
    trained = {name for group in phase.groups for name in group.parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    # The block beside the first memory has a constant input too: only what comes after it is differentiated.
    assert differentiated_blocks(system, model, ids) == {0: False, 1: False, 2: True}
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)


def test_from_the_second_step_every_memory_parameter_learns(ids: Tensor) -> None:
    first, second, everything = learning_in_two_steps(base(), ids)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in first} == {"o_proj"}
    assert second == everything


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
    assert_recomputation_changes_nothing(base(), ids)


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
