"""The attachment `slots` in a model: the backbone exactly while nothing has left the window, and what is learned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from pipeline.data.batch import TokenBatch
from pipeline.errors import UserError
from pipeline.lm.config import BackboneConfig
from pipeline.ops import attention_slots_native, importance, native
from pipeline.parallel.topology import Topology
from pipeline.systems.miras import create
from pipeline.systems.miras.config import MemoryConfig, MirasConfig
from pipeline.systems.miras.model import MirasModel
from pipeline.systems.miras.rule_config import SlotsConfig
from pipeline.systems.miras.slots import slots_backend
from pipeline.systems.miras.system import MirasSystem
from tests.launch.parity_main import LENGTH, VOCABULARY, attached
from tests.lm.families import FAMILIES, save_decoder
from tests.systems.miras.harness import (
    assert_packed_equals_apart,
    assert_recomputation_changes_nothing,
    assert_steps_equal_one,
    batch,
    built,
    cut,
    differentiated_blocks,
    run,
    tokens,
)
from tests.systems.miras.test_overflow import SINKS, WINDOW, with_memory

CHUNK = 4
"""Of the model of the tests, which has 8 slots: a document behind its window fills them in two chunks."""


@pytest.fixture
def ids() -> Tensor:
    return tokens()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.bfloat16, 0.1)], ids=str)
def test_nothing_changes_until_a_token_has_left_the_window(ids: Tensor, dtype: torch.dtype, error: float) -> None:
    """Rounded otherwise in bfloat16, as another kernel's blocks do; emptied it is the backbone itself, bit for bit."""
    system, model = built(attached("slots"), dtype=dtype)
    part = batch(ids, [WINDOW + SINKS, 3, LENGTH - WINDOW - SINKS - 3])
    on, off = (run(system, model, part, memory=memory).tokens["losses"][0] for memory in (True, False))
    inside = part.positions[0] < WINDOW + SINKS
    assert (on - off)[inside].abs().max() <= error
    assert (on != off)[~inside & (part.labels[0] >= 0)].double().mean() > 0.9
    assert torch.equal(run(system, model, part, emptied=True).tokens["losses"][0], off)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_itself_within_the_window_and_learns_beyond_it(name: str, tmp_path: Path, ids: Tensor) -> None:
    folder = save_decoder(name, tmp_path)
    config = with_memory(attached("slots", trainable=False), layers=("upper2",), heads=3, head_dim=7)
    assert isinstance(config.model, MirasConfig)
    backbone = BackboneConfig(pretrained=str(folder))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
    system, model = built(config, noisy=False, dtype=torch.float32)
    system.check(Topology())
    model.backbone.requires_grad_(False)
    part = batch(ids, [12, LENGTH - 12])
    output = run(system, model, part)
    off = run(system, model, part, memory=False).tokens["losses"][0]
    losses = output.tokens["losses"][0]
    torch.testing.assert_close(losses[:24], off[:24], rtol=1e-5, atol=1e-5)
    assert (losses[24:-1] != off[24:-1]).all()
    output.sums["cross_entropy"].backward()
    assert all(parameter.grad.any() for parameter in model.memory.parameters())


def test_on_a_gpu_attention_to_slots_is_flex() -> None:
    assert slots_backend(MemoryConfig(attachment="slots"), "flex", torch.device("cuda"), torch.bfloat16) == "flex"


@pytest.mark.skipif(not native.load("cpu"), reason=str(native.why_not("cpu")))
@pytest.mark.parametrize("lengths", [[LENGTH], [20, 3, LENGTH - 23]], ids=str)
def test_the_native_kernel_and_the_path_in_pytorch_are_one(
    lengths: list[int], tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and every gradient of a whole model, of grouped heads of 16 in float32."""
    folder = save_decoder("qwen3", tmp_path)
    calls: list[int] = []
    kernel = attention_slots_native.slot_attention

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return kernel(*arguments)

    monkeypatch.setattr(attention_slots_native, "slot_attention", counted)
    found = []
    for backend, name in (("auto", "native"), ("torch", "sdpa")):
        config = with_memory(attached("slots", trainable=True), layers=("every1",), backend=backend)
        assert isinstance(config.model, MirasConfig)
        backbone = BackboneConfig(pretrained=str(folder), trainable=True)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
        system, model = built(config, dtype=torch.float32)
        assert system.describe("cpu", torch.float32)["memory"].endswith(f"backend {name}"), "the log's"
        output = run(system, model, batch(ids, lengths))
        output.sums["cross_entropy"].backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append({"losses": output.tokens["losses"][0], **grads})
    assert len(calls) == 3, "the three layers of one of the two models"
    for name, one in found[0].items():
        other = found[1][name]
        assert one is not None and other is not None and other.any(), name
        assert (one - other).norm() <= 1e-4 * other.norm(), name


def test_packed_documents_equal_the_same_documents_apart_where_chunks_fall_alike(
    ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which tokens ask for importance is by the row: all of them.
    monkeypatch.setattr(importance, "QUERIES", LENGTH)
    assert_packed_equals_apart(attached("slots"), ids, [4, 24, 4, 16])


def test_a_document_split_over_three_steps_equals_one(ids: Tensor) -> None:
    system, model = built(attached("slots"))
    for lengths in ([LENGTH], [7, LENGTH - 7], [5, 3, 40]):
        for cuts in ((CHUNK, 5 * CHUNK), (16, 32)):
            assert_steps_equal_one(system, model, batch(ids, lengths), cuts)


def test_no_token_changes_an_earlier_loss_or_another_document(ids: Tensor) -> None:
    system, model = built(attached("slots"))
    lengths = [20, LENGTH - 20]
    before, labels = run(system, model, batch(ids, lengths)).tokens["losses"][0], batch(ids, lengths).labels
    for place in (0, 6, 19, 20, 21, 30, 40):
        changed = ids.clone()
        changed[place] = (changed[place] + 1) % VOCABULARY
        part = dataclasses.replace(batch(changed, lengths), labels=labels)
        change = (run(system, model, part).tokens["losses"][0] - before).abs()
        end = 20 if place < 20 else LENGTH
        assert not change[:place].any() and not change[end:].any()
        assert (change[place:end][labels[0, place:end] >= 0] > 0).all()


@pytest.mark.parametrize("trainable", [True, False])
def test_recomputation_changes_nothing(ids: Tensor, trainable: bool) -> None:
    assert_recomputation_changes_nothing(attached("slots"), ids, trainable=trainable)


def test_a_frozen_backbone_has_no_backward_pass_below_the_first_memory(ids: Tensor) -> None:
    system, model = built(attached("slots"))
    model.backbone.requires_grad_(False)
    assert differentiated_blocks(system, model, ids) == {0: False, 1: True, 2: True}


@pytest.mark.parametrize(
    "layers, kinds",
    [({"overflow_layers": (2,)}, ["slots", "overflow"]), ({"layers": (1,)}, ["slots"])],
    ids=["beside overflow", "on one layer"],
)
def test_on_some_layers_alone(ids: Tensor, layers: dict[str, tuple[int]], kinds: list[str]) -> None:
    system, model = built(with_memory(attached("slots"), **layers))
    assert [kind.attachment for kind in model.kinds.values()] == kinds
    assert_steps_equal_one(system, model, batch(ids, [7, LENGTH - 7]), (8, 20))
    run(system, model, batch(ids, [LENGTH])).sums["cross_entropy"].backward()
    assert all(parameter.grad.any() for parameter in model.memory.parameters())


def test_the_health_is_how_full_the_slots_are(ids: Tensor) -> None:
    system, model = built(attached("slots"))

    def health(lengths: list[int]) -> tuple[dict[str, float], str]:
        metrics = run(system, model, batch(ids, lengths)).metrics
        found = {name: float(value / count) for name, (value, count) in metrics.items()}
        return found, system.health(found)

    found, line = health([LENGTH])
    assert found["memory/slots_used"] == 1
    # The last chunk's window still sees what lies `WINDOW` behind it.
    assert found["memory/tokens_per_slot"] == pytest.approx((LENGTH - WINDOW - SINKS) / 8)
    assert line.startswith("100 % of the slots used | 4.5 tokens each")
    assert health([12] * 4)[0]["memory/slots_used"] == 0


def importance_gradients(system: MirasSystem, model: MirasModel, part: TokenBatch) -> dict[str, Tensor]:
    model.zero_grad()
    run(system, model, part).sums["cross_entropy"].backward()
    return {name: x.grad for name, x in model.named_parameters() if "importance_" in name and x.grad is not None}


def test_importance_learns_beside_the_loss_and_does_not_change_it(ids: Tensor) -> None:
    system, model = built(attached("slots"))
    part = batch(ids, [20, LENGTH - 20])
    output = run(system, model, part)
    assert output.sums["cross_entropy"].item() == pytest.approx(output.tokens["losses"].sum().item(), rel=1e-12)
    nats, attention = output.metrics["memory/importance_nats"]
    assert nats > 0 and 0 < attention < 2 * LENGTH * len(model.memory)
    assert "importance" in system.health({"memory/slots_used": 1, "memory/tokens_per_slot": 2} | {
        "memory/importance_nats": float(nats / attention)
    })  # fmt: skip
    # Nothing else moves it: only where a query has something behind its window is there a gradient.
    assert all(x.any() for x in importance_gradients(system, model, part).values())
    within = importance_gradients(system, model, batch(ids, [WINDOW] * 4 + [LENGTH - 4 * WINDOW]))
    assert within and not any(x.any() for x in within.values())


def test_a_carry_from_before_slots_had_weights_is_read(ids: Tensor) -> None:
    system, model = built(with_memory(attached("slots"), slots=SlotsConfig(count=8, chunk=CHUNK, reach=14)))
    part = batch(ids, [LENGTH])
    first = run(system, model, cut(part, 0, 24))
    old = {name: entry for name, entry in first.carry.items() if not name.endswith("memory.weights")}
    assert len(old) < len(first.carry)
    found, wanted = (run(system, model, cut(part, 24, LENGTH), carry).tokens["losses"] for carry in (old, first.carry))
    assert torch.equal(found, wanted)


def test_importance_is_no_part_of_an_evaluation(ids: Tensor) -> None:
    system, model = built(attached("slots"))
    part = batch(ids, [LENGTH])
    model.eval()
    assert "memory/importance_nats" not in run(system, model, part).metrics
    model.train()
    with torch.no_grad():
        assert "memory/importance_nats" not in run(system, model, part).metrics


def test_what_cannot_be_is_refused(ids: Tensor) -> None:
    for config, message in (
        (attached("slots", "full"), "nothing leaves a window"),
        (with_memory(attached("slots"), slots=SlotsConfig(count=64, chunk=12)), "the window's, which is 10 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            create(config)
    with pytest.raises(UserError, match="4 slots cannot take so many tokens at once"):
        SlotsConfig(count=4, chunk=5)
    odd = create(with_memory(attached("slots"), slots=SlotsConfig(count=64, chunk=9)))
    with pytest.raises(UserError, match="does not divide the --sequence-length 48"):
        odd.check(Topology())


def test_slots_stand_no_further_than_the_backbone_was_trained_for(tmp_path: Path) -> None:
    folder = save_decoder("llama", tmp_path)
    config = attached("slots")
    assert isinstance(config.model, MirasConfig)
    trained = AutoConfig.from_pretrained(folder).max_position_embeddings
    most = trained - WINDOW - CHUNK
    model = dataclasses.replace(config.model, backbone=BackboneConfig(pretrained=str(folder)))
    config = dataclasses.replace(config, model=model)
    create(with_memory(config, slots=SlotsConfig(count=8, chunk=CHUNK, reach=most)))
    with pytest.raises(UserError, match=f"reach {most + 1}: .*further than the {trained} positions.*at most {most}$"):
        create(with_memory(config, slots=SlotsConfig(count=8, chunk=CHUNK, reach=most + 1)))


def test_rules_settings_are_none_of_its_own() -> None:
    model: Any = attached("slots").model
    assert {"rule", "step_size", "heads", "gate_rank"} <= model.memory.ignored_fields
    assert "slots" not in model.memory.ignored_fields
