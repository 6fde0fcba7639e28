"""Each attachment of the memory: causal, documents apart, joined by the carry, the backbone at step 0, and learning."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.data.batch import IGNORED
from pipeline.data_config import DataConfig, RecallConfig
from pipeline.errors import UserError
from pipeline.lm.config import BackboneConfig
from pipeline.lm.pretrained import backbone_config
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_recall
from pipeline.system import Phase
from pipeline.systems.miras import create
from pipeline.systems.miras.attachments import check_attachment
from pipeline.systems.miras.config import MemoryConfig, MirasConfig
from pipeline.systems.miras.emptied import EMPTIED, WITHOUT
from pipeline.systems.miras.model import MirasModel
from pipeline.systems.miras.rule_config import SwigluConfig
from pipeline.systems.miras.system import MirasSystem
from tests.launch.parity_main import CONTEXT as SEGMENT
from tests.launch.parity_main import LENGTH, VOCABULARY, attached
from tests.systems.miras.harness import (
    CONTEXT,
    assert_memory_adds_nothing,
    assert_packed_equals_apart,
    assert_recomputation_changes_nothing,
    assert_steps_equal_one,
    batch,
    built,
    differentiated_blocks,
    keep_norms_precise,
    learning_in_two_steps,
    run,
    run_in_steps,
    tokens,
)

ATTACHMENTS = ("residual", "mal", "mag", "mac")
NEW = ATTACHMENTS[1:]
RULES = ("titans", "delta", "moneta", "yaad", "memora", "mlp", "swiglu")


@pytest.fixture
def ids() -> Tensor:
    return tokens()


def losses(config: RunConfig, ids: Tensor, lengths: list[int], dtype: torch.dtype = torch.float64) -> Tensor:
    system, model = built(config, dtype=dtype)
    return run(system, model, batch(ids, lengths)).tokens["losses"][0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attachment", NEW)
def test_at_step_zero_the_model_is_its_backbone(ids: Tensor, attachment: str, dtype: torch.dtype) -> None:
    system, model = built(attached(attachment), noisy=False, dtype=dtype)
    assert_memory_adds_nothing(system, model, batch(ids, [30, LENGTH - 30]))


@pytest.mark.parametrize("attachment", ATTACHMENTS)
def test_with_the_memory_off_the_model_is_its_backbone(ids: Tensor, attachment: str) -> None:
    """However much the memory has learned, and nothing of it is carried."""
    part = batch(ids, [30, LENGTH - 30])
    system, model = built(attached(attachment))
    off = run(system, model, part, memory=False)
    on = run(system, model, part)
    bare = dataclasses.replace(system.sizes, memory=dataclasses.replace(system.sizes.memory, layers=()))
    plain = MirasModel(bare, system.backbone).to(torch.float64)
    plain.backbone.load_state_dict(model.backbone.state_dict())
    keep_norms_precise(plain)
    expected = run(system, plain, part)
    assert torch.equal(off.tokens["losses"], expected.tokens["losses"])
    assert (on.tokens["losses"] - off.tokens["losses"]).abs().max() > 1e-3
    assert not any("memory" in name for name in off.carry) and not off.metrics.keys() & {"norm_M"}


@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("attachment", NEW)
def test_packed_documents_equal_the_same_documents_apart(ids: Tensor, attachment: str, kind: str) -> None:
    assert_packed_equals_apart(attached(attachment, kind), ids, [3, 24, 1, 20])


@pytest.mark.parametrize("cuts", [(16, 32), (5, 6), (10, 21), (1, 47)])
@pytest.mark.parametrize("attachment", NEW)
def test_a_document_split_over_three_steps_equals_one(ids: Tensor, attachment: str, cuts: tuple[int, int]) -> None:
    system, model = built(attached(attachment))
    for lengths in ([LENGTH], [7, LENGTH - 7], [5, 3, 40]):
        assert_steps_equal_one(system, model, batch(ids, lengths), cuts)


@pytest.mark.parametrize("attachment", NEW)
def test_token_by_token_equals_one_go(ids: Tensor, attachment: str) -> None:
    system, model = built(attached(attachment))
    whole = batch(ids, [4, LENGTH - 4])
    expected = run(system, model, whole).tokens["losses"][0]
    found, _ = run_in_steps(system, model, whole, range(1, LENGTH))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("attachment", NEW)
def test_no_token_changes_an_earlier_loss_or_another_document(ids: Tensor, attachment: str, dtype: torch.dtype) -> None:
    """Exactly nothing; and every later loss of the document changes."""
    system, model = built(attached(attachment), dtype=dtype)
    lengths = [20, LENGTH - 20]
    before = run(system, model, batch(ids, lengths)).tokens["losses"][0]
    labels = batch(ids, lengths).labels
    for place in range(LENGTH):
        changed = ids.clone()
        changed[place] = (changed[place] + 1) % VOCABULARY
        part = dataclasses.replace(batch(changed, lengths), labels=labels)
        change = (run(system, model, part).tokens["losses"][0] - before).abs()
        end = 20 if place < 20 else LENGTH
        assert not change[:place].any()
        assert not change[end:].any()
        counted = labels[0, place:end] >= 0
        assert (change[place:end][counted] > 0).all()


@pytest.mark.parametrize("attachment", NEW)
def test_recomputation_changes_nothing(ids: Tensor, attachment: str) -> None:
    for trainable in (True, False):
        assert_recomputation_changes_nothing(attached(attachment), ids, trainable=trainable)


FIRST = {"mal": {"o_proj"}, "mag": {"o_proj"}, "mac": {"context_gate", "core"}}
"""The modules that learn at step 0: those that start at zero."""


@pytest.mark.parametrize("attachment", NEW)
def test_from_the_second_step_every_memory_parameter_learns(ids: Tensor, attachment: str) -> None:
    first, second, everything = learning_in_two_steps(attached(attachment), ids)
    assert {name.split(".")[-2] for name in first} == FIRST[attachment]
    assert {name for name in first if ".core." in name} <= {"1.core.out_gate", "2.core.out_gate"}
    assert second == everything


@pytest.mark.parametrize("attachment", NEW)
def test_a_frozen_backbone_has_no_backward_pass_below_the_first_memory(ids: Tensor, attachment: str) -> None:
    system, model = built(attached(attachment))
    model.backbone.requires_grad_(False)
    # Unlike a memory beside it, one in front of or inside the block makes the block differentiable.
    assert differentiated_blocks(system, model, ids) == {0: False, 1: True, 2: True}
    assert all(parameter.grad.any() for parameter in model.memory.parameters())


@pytest.mark.parametrize("attachment", ATTACHMENTS)
def test_the_carry_is_constant_and_says_where_its_heads_are(ids: Tensor, attachment: str) -> None:
    system, model = built(attached(attachment))
    carry = run(system, model, batch(ids, [LENGTH])).carry
    assert carry and not any(entry.tensor.requires_grad for entry in carry.values())
    heads = system.sizes.memory.heads
    for name, entry in carry.items():
        assert entry.tensor.shape[entry.streams] == 1
        assert (entry.heads is None) == name.endswith(("segment_ids", "positions", "tail_segments"))
        assert entry.heads is None or entry.tensor.shape[entry.heads] == heads


@pytest.mark.parametrize("attachment", NEW)
def test_half_precision_stays_finite_and_close(ids: Tensor, attachment: str) -> None:
    exact = losses(attached(attachment), ids, [20, LENGTH - 20])
    rough = losses(attached(attachment), ids, [20, LENGTH - 20], torch.bfloat16)
    assert rough.isfinite().all()
    assert (rough - exact).norm() / exact.norm() < 0.05


def ruled(attachment: str, rule: str) -> RunConfig:
    """A memory of another rule; its chunks do not divide the segments."""
    config = attached(attachment)
    assert isinstance(config.model, MirasConfig)
    memory = dataclasses.replace(
        config.model.memory, rule=rule, gradient_chunk=3, swiglu=SwigluConfig(gradient_chunk=5), layers=(1,)
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory))


@pytest.mark.parametrize("rule", RULES)
class TestEveryRule:
    @pytest.mark.parametrize("attachment", NEW)
    def test_it_starts_as_the_backbone_and_all_of_it_learns(self, ids: Tensor, attachment: str, rule: str) -> None:
        system, model = built(ruled(attachment, rule), noisy=False)
        part = batch(ids, [LENGTH])
        assert_memory_adds_nothing(system, model, part)
        system, model = built(ruled(attachment, rule))
        run(system, model, part).sums["cross_entropy"].backward()
        assert all(parameter.grad.any() for parameter in model.memory.parameters())

    def test_mac_is_the_same_packed_or_apart_and_in_any_steps(self, ids: Tensor, rule: str) -> None:
        """Chunks are counted from a segment's start, so that also the rules that depend on them are."""
        system, model = built(ruled("mac", rule))
        lengths = [3, 4, 24, 17]
        whole = run(system, model, batch(ids, lengths)).tokens["losses"][0]
        apart = [run(system, model, batch(piece, [len(piece)])).tokens["losses"][0] for piece in ids.split(lengths)]
        torch.testing.assert_close(whole, torch.cat(apart), rtol=1e-9, atol=1e-9)
        found, _ = run_in_steps(system, model, batch(ids, lengths), (9, 10, 26, 36))
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("attachment", NEW)
    def test_the_future_changes_exactly_nothing(self, ids: Tensor, attachment: str, rule: str) -> None:
        system, model = built(ruled(attachment, rule))
        before = run(system, model, batch(ids, [LENGTH])).tokens["losses"][0]
        for place in (6, 7, 20, 30, 47):
            changed = ids.clone()
            changed[place] = (changed[place] + 1) % VOCABULARY
            after = run(system, model, batch(changed, [LENGTH])).tokens["losses"][0]
            # The label of the token before is another one.
            assert torch.equal(after[: place - 1], before[: place - 1])
            assert place == LENGTH - 1 or (after[place:-1] != before[place:-1]).all()


class TestMemoryAsLayerAndGate:
    """What is done with the branch's output, against the backbone's own layers."""

    def test_mal_adds_it_before_the_block(self, ids: Tensor) -> None:
        system, model = built(attached("mal"))
        seen: dict[str, Tensor] = {}
        layer, branch = model.backbone.model.layers[1], model.memory["1"]
        layer.register_forward_hook(lambda _, args, __: seen.update(block=args[0]))
        branch.register_forward_hook(lambda _, args, out: seen.update(hidden=args[0], added=out[0]))
        run(system, model, batch(ids, [LENGTH]))
        assert torch.equal(seen["block"], seen["hidden"] + seen["added"])
        assert seen["added"].abs().max() > 0.1

    def test_mag_gates_what_the_heads_give(self, ids: Tensor) -> None:
        seen: dict[bool, Tensor] = {}
        system, model = built(attached("mag"))
        attention, branch = model.backbone.model.layers[1].self_attn, model.memory["1"]
        branch.register_forward_hook(lambda _, __, out: seen.update(gate=out[0]))
        for memory in (False, True):
            handle = attention.o_proj.register_forward_hook(
                lambda _, args, __, memory=memory: seen.update({memory: args[0]})
            )
            run(system, model, batch(ids, [LENGTH]), memory=memory)
            handle.remove()
        torch.testing.assert_close(seen[True], seen[False] * 2 / (1 + torch.exp(-seen["gate"])), rtol=1e-12, atol=1e-12)
        assert seen["gate"].abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("attachment", ATTACHMENTS)
def test_training_learns_to_recall_beyond_the_window(
    attachment: str, record_property: Callable[[str, object], None]
) -> None:
    """miras_recall in small: 4 pairs, asked for at 24 tokens or more from a window of 8. Chance is 1 in 8."""
    recipe = miras_recall()
    assert isinstance(recipe.model, MirasConfig)
    model_config = dataclasses.replace(
        recipe.model,
        backbone=dataclasses.replace(recipe.model.backbone, vocabulary=25),
        attention=dataclasses.replace(recipe.model.attention, window=8),
        memory=dataclasses.replace(recipe.model.memory, attachment=attachment, context=8),
    )
    task = RecallConfig(keys=8, values=8, fillers=8, pairs=4, queries=4, min_gap=24, max_gap=60)
    data = DataConfig(recall=task)
    system = create(dataclasses.replace(recipe, model=model_config, data=data, sequence_length=64))
    assert isinstance(system, MirasSystem)
    model = system.build()
    system.initialise(model, Topology())
    steps = 400
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    loader = system.open_loader(Topology(), held_out=False)
    for step in range(steps):
        (part,) = loader.next_step()
        output = system.forward(model, part, {}, dataclasses.replace(CONTEXT, step=step + 1))
        optimizer.zero_grad()
        (output.sums["cross_entropy"] / system.count(part)["cross_entropy"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    found = {}
    held_out = system.held_out(Phase("train", 1, ()), Topology())
    parts = [held_out.next_step()[0] for _ in range(4)]
    for mode, options in {"on": {"memory": True}, "off": WITHOUT, "emptied": EMPTIED}.items():
        right = counted = 0
        for part in parts:
            with torch.no_grad():
                output = run(system, model, part, predict=True, **options)
            asked = part.labels != IGNORED
            right += int((output.tokens["predictions"] == part.labels)[asked].sum())
            counted += int(asked.sum())
        found[mode] = right / counted
    record_property(attachment, f"{found['on']:.3f}, memory off {found['off']:.3f}, emptied {found['emptied']:.3f}")
    assert found["on"] > 0.6
    assert found["off"] < 0.35
    assert found["emptied"] < 0.35


def test_mac_needs_a_memory_per_attention_head() -> None:
    backbone = backbone_config(BackboneConfig(layers=2, width=32, heads=4, kv_heads=2, ffn=48, vocabulary=64))
    for attachment in ATTACHMENTS:
        config = MemoryConfig(layers=(1,), heads=2, head_dim=8, attachment=attachment)  # type: ignore[arg-type]
        if attachment == "mac":
            with pytest.raises(UserError, match=r"--model.memory.heads 2: .*give 4"):
                check_attachment(config, backbone)
        else:
            check_attachment(config, backbone)
    check_attachment(MemoryConfig(layers=(1,), heads=4, head_dim=8, attachment="mac"), backbone)


def test_mac_with_fewer_key_value_heads(ids: Tensor) -> None:
    config = attached("mac")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, backbone=dataclasses.replace(config.model.backbone, kv_heads=2))
    )
    assert losses(config, ids, [LENGTH]).isfinite().all()


def test_the_context_of_the_tests_is_shorter_than_their_documents() -> None:
    assert 1 < SEGMENT < LENGTH / 2
