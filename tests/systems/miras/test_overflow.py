"""The attachment `overflow`: its definition token by token, the backbone exactly while nothing has left the window."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.lm.attention import AttentionCall, Beside, attend
from pipeline.lm.config import AttentionConfig, BackboneConfig
from pipeline.ops.attention import Rope, plan_window_attention
from pipeline.parallel.topology import Topology
from pipeline.systems.miras import create
from pipeline.systems.miras.config import MemoryConfig, MirasConfig
from pipeline.systems.miras.overflow import OverflowMemory, plan_overflow
from pipeline.systems.miras.rule_config import SwigluConfig
from pipeline.systems.miras.rules import SwigluRule
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
    run_in_steps,
    tokens,
)
from tests.systems.miras.overflow_reference import Weights, overflow

WINDOW, SINKS = 10, 2
"""Of the model of the tests; WINDOW + SINKS tokens of a document leave nothing behind the window but sinks."""
RULES = ("titans", "delta", "moneta", "yaad", "memora", "mlp", "swiglu")


@pytest.fixture
def ids() -> Tensor:
    return tokens()


def with_memory(config: RunConfig, **changes: Any) -> RunConfig:
    assert isinstance(config.model, MirasConfig)
    memory = dataclasses.replace(config.model.memory, **changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory))


def ruled(rule: str) -> RunConfig:
    return with_memory(attached("overflow"), rule=rule, gradient_chunk=3, swiglu=SwigluConfig(gradient_chunk=5))


@pytest.mark.parametrize(
    ("rule", "activation"), [("titans", "silu"), ("titans", "none"), ("delta", "silu"), ("delta", "none")]
)
@pytest.mark.parametrize(("kv_heads", "sinks"), [(1, 2), (2, 0), (4, 2)])
def test_values_and_gradients_are_those_of_the_token_loop(
    rule: Any, activation: Any, kv_heads: int, sinks: int
) -> None:
    """float32 through the layers' own path, against float64; documents of one row, each by itself in the loop."""
    heads, dim, window, lengths = 4, 8, 5, [4, 21, 1, 14]
    count = sum(lengths)
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "q": noise(count, heads, dim), "k": noise(count, kv_heads, dim), "v": noise(count, kv_heads, dim),
        "logits": noise(count, heads, 2),
    }  # fmt: skip
    config = MemoryConfig(
        layers=(0,), attachment="overflow", rule=rule, heads=heads, head_dim=dim, key_activation=activation
    )
    memory = OverflowMemory(config)
    for parameter in memory.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    weights = {name: parameter.detach().double().requires_grad_() for name, parameter in memory.named_parameters()}
    frequencies = 100.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    coefficients = noise(count, heads, dim)

    exact = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    pieces = zip(*(exact[name].split(lengths) for name in inputs), strict=True)
    whole = Weights(**{"eta_logits": None, **weights})
    function = torch.nn.functional.silu if activation == "silu" else torch.nn.Identity()
    sizes = {"frequencies": frequencies, "window": window, "sinks": sinks, "activation": function}
    expected = torch.cat([overflow(q, k, v, *logits.unbind(-1), whole, **sizes) for q, k, v, logits in pieces])  # type: ignore[arg-type]
    (expected * coefficients).sum().backward()

    found = {name: x.float().requires_grad_() for name, x in inputs.items()}
    segments = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    plan = plan_window_attention(
        segments, positions, rope=Rope(frequencies), window=window, sinks=sinks, carry=None, backend="sdpa",
        dtype=torch.float32,
    )  # fmt: skip
    leaving = plan_overflow(segments, positions, None, window=window, sinks=sinks)

    def refine(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, logits: Tensor) -> Tensor:
        return memory(logits, q, k, v, out, leaving, (None, None), Topology())[0]

    module = nn.Module()
    module.layer_idx = 0
    q, k, v = (found[name].transpose(0, 1)[None] for name in ("q", "k", "v"))
    call, beside = AttentionCall(plan, Topology(), [None]), Beside(tokens=[found["logits"][None]], refine=refine)
    out, _ = attend(module, q, k, v, None, scaling=dim**-0.5, attention_call=call, beside=beside)
    (out[0] * coefficients).sum().backward()

    torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-5)
    gradients = {name: (found[name].grad, exact[name].grad) for name in inputs}
    gradients |= {name: (parameter.grad, weights[name].grad) for name, parameter in memory.named_parameters()}
    for name, (ours, theirs) in gradients.items():
        assert theirs is not None and theirs.abs().max() > 0, name
        close = 1e-5 * float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=close, check_dtype=False, msg=name)


def called(rule: Any) -> tuple[OverflowMemory, dict[str, Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """A random memory in float64, its logits, queries and keys of one document, and its output of values [1, tokens,
    heads, dim] and of what attention gave."""
    heads, dim, count = 2, 8, 30
    generator = torch.Generator().manual_seed(3)
    config = MemoryConfig(
        layers=(0,), attachment="overflow", rule=rule, heads=heads, head_dim=dim, swiglu=SwigluConfig(gradient_chunk=5)
    )
    memory = OverflowMemory(config).double()
    for parameter in memory.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    inputs = {
        name: torch.randn(1, count, heads, size, generator=generator, dtype=torch.float64)
        for name, size in (("logits", 2), ("q", dim), ("k", dim))
    }
    plan = plan_overflow(torch.zeros(1, count, dtype=torch.int64), torch.arange(count)[None], None, window=4, sinks=1)

    def output(v: Tensor, attended: Tensor) -> Tensor:
        out: Tensor = memory(*inputs.values(), v, attended, plan, (None, None), Topology())[0]
        return out

    return memory, inputs, output


@pytest.mark.parametrize("rule", ["titans", "delta", "swiglu"])
def test_the_memorys_part_is_as_large_as_the_values_are(rule: str) -> None:
    """swiglu reads with weights of a fixed size: beside small values they would be all of the output."""
    _, inputs, output = called(rule)
    v, attended = torch.randn_like(inputs["q"]), torch.randn_like(inputs["k"])
    found = output(v, attended)
    assert (found != attended).any()
    for scale in (1e-2, 1e2):
        torch.testing.assert_close(output(scale * v, scale * attended), scale * found, rtol=1e-9, atol=1e-9 * scale)


def test_swiglu_is_written_directions_and_read_in_the_size_of_attention() -> None:
    memory, inputs, output = called("swiglu")
    assert isinstance(memory.rule, SwigluRule)
    v, attended = torch.randn_like(inputs["q"]), torch.randn_like(inputs["k"])
    (q, k), (beta, share) = (inputs["q"], inputs["k"]), inputs["logits"].unbind(-1)

    def unit(x: Tensor, change: Tensor) -> Tensor:
        x = x + torch.einsum("bthd,hde->bthe", x, change)
        return normalize(silu(x), dim=-1)

    def late(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(1, 4, *x.shape[2:]), x[:, :-4]], dim=1)

    left = torch.arange(v.shape[1])[None, :, None] >= 5
    write = late(beta) + (late(k) * memory.step_key).sum(-1)
    read, _, _ = memory.rule(
        unit(q, memory.q_map), unit(late(k), memory.k_map), normalize(late(v), dim=-1),
        memory.alpha_logits.expand_as(write), write.masked_fill(~left, -torch.inf), memory.eta_logits,
        memory.rule.empty_state(1, slice(0, 2), q), torch.zeros(1, v.shape[1], dtype=torch.int64), slice(0, 2),
    )  # fmt: skip
    part = torch.sigmoid(share + (q * memory.share_query).sum(-1))[..., None] * left[..., None]
    size = attended.square().mean(-1, keepdim=True).sqrt()
    sized = size * read / (1 + read.square().mean(-1, keepdim=True)).sqrt()
    torch.testing.assert_close(output(v, attended), (1 - part) * attended + part * sized)
    assert (sized.square().mean(-1) < attended.square().mean(-1)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_nothing_changes_by_a_bit_until_a_token_has_left_the_window(ids: Tensor, rule: str, dtype: torch.dtype) -> None:
    """However much the memory has learned; and from then on every token is another one."""
    system, model = built(ruled(rule), dtype=dtype)
    lengths = [WINDOW + SINKS, 3, LENGTH - WINDOW - SINKS - 3]
    part = batch(ids, lengths)
    on, off = (run(system, model, part, memory=memory).tokens["losses"][0] for memory in (True, False))
    inside = part.positions[0] < WINDOW + SINKS
    assert torch.equal(on[inside], off[inside])
    assert (on != off)[~inside & (part.labels[0] >= 0)].double().mean() > 0.9


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_itself_within_the_window_and_learns_beyond_it(name: str, tmp_path: Path, ids: Tensor) -> None:
    """Grouped heads, biases, norms of queries and keys, heads of another size than the width gives: nothing is asked
    of --model.memory.heads."""
    folder = save_decoder(name, tmp_path)
    config = with_memory(attached("overflow", trainable=False), layers=("upper2",), heads=3, head_dim=7)
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
    assert torch.equal(losses[:24], off[:24])
    assert (losses[24:-1] != off[24:-1]).all()
    output.sums["cross_entropy"].backward()
    assert all(parameter.grad.any() for parameter in model.memory.parameters())
    assert sorted(model.memory) == ["1", "2"]


def test_at_the_start_it_is_the_delta_rule_of_the_layers_own_keys_with_a_small_share(ids: Tensor) -> None:
    config = with_memory(attached("overflow"), share=0.2, step_size=(0.3, 0.3), half_life=(1000.0, 1000.0))
    system, model = built(config, noisy=False)
    branch: Any = model.memory["1"]
    assert not branch.core.q_map.any() and not branch.core.k_map.any()
    logits = branch.inputs(torch.randn(1, 5, 32, dtype=torch.float64))
    torch.testing.assert_close(logits[..., 1].sigmoid(), torch.full((1, 5, 4), 0.2, dtype=torch.float64))
    health = {
        name: float(value / count) for name, (value, count) in run(system, model, batch(ids, [LENGTH])).metrics.items()
    }
    assert health["memory/theta"] == pytest.approx(0.3, rel=0.05)
    assert health["memory/alpha"] == pytest.approx(0.000693, rel=0.01)


def test_the_health_is_that_of_the_tokens_that_have_left(ids: Tensor) -> None:
    system, model = built(attached("overflow"))
    short = run(system, model, batch(ids, [12] * 4)).metrics
    assert float(short["memory/theta"][1]) == 0 == float(short["memory/theta"][0])
    long = run(system, model, batch(ids, [LENGTH])).metrics
    assert float(long["memory/theta"][1]) == 2 * 4 * (LENGTH - WINDOW - SINKS)


def test_packed_documents_equal_the_same_documents_apart(ids: Tensor) -> None:
    assert_packed_equals_apart(attached("overflow"), ids, [3, 24, 1, 20])


@pytest.mark.parametrize("cuts", [(16, 32), (5, 6), (10, 21), (1, 47)])
def test_a_document_split_over_three_steps_equals_one(ids: Tensor, cuts: tuple[int, int]) -> None:
    system, model = built(attached("overflow"))
    for lengths in ([LENGTH], [7, LENGTH - 7], [5, 3, 40]):
        assert_steps_equal_one(system, model, batch(ids, lengths), cuts)


def test_token_by_token_equals_one_go(ids: Tensor) -> None:
    system, model = built(attached("overflow"))
    whole = batch(ids, [4, LENGTH - 4])
    found, _ = run_in_steps(system, model, whole, range(1, LENGTH))
    torch.testing.assert_close(found, run(system, model, whole).tokens["losses"][0], rtol=1e-9, atol=1e-9)


def test_a_memory_that_starts_behind_a_window_takes_in_nothing_of_it(ids: Tensor) -> None:
    """Switched on in the second step: what the first one left in the window passes it by."""
    system, model = built(attached("overflow"))
    whole = batch(ids, [LENGTH])
    carry = run(system, model, cut(whole, 0, 20), memory=False).carry
    on, off = (
        run(system, model, cut(whole, 20, LENGTH), carry, memory=memory).tokens["losses"][0] for memory in (True, False)
    )
    assert torch.equal(on[:WINDOW], off[:WINDOW])
    assert (on[WINDOW:-1] != off[WINDOW:-1]).all()


@pytest.mark.parametrize("rule", RULES)
def test_no_token_changes_an_earlier_loss_or_another_document(ids: Tensor, rule: str) -> None:
    system, model = built(ruled(rule))
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


@pytest.mark.parametrize("rule", RULES)
def test_all_of_it_learns_from_the_first_step_on(ids: Tensor, rule: str) -> None:
    """What a rule has of its own may wait for larger errors than those of the first step."""
    for noisy in (False, True):
        system, model = built(ruled(rule), noisy=noisy)
        run(system, model, batch(ids, [LENGTH])).sums["cross_entropy"].backward()
        still = [name for name, parameter in model.memory.named_parameters() if not parameter.grad.any()]
        assert not still if noisy else all(".rule." in name for name in still)


@pytest.mark.parametrize("trainable", [True, False])
def test_recomputation_changes_nothing(ids: Tensor, trainable: bool) -> None:
    assert_recomputation_changes_nothing(attached("overflow"), ids, trainable=trainable)


def test_a_frozen_backbone_has_no_backward_pass_below_the_first_memory(ids: Tensor) -> None:
    system, model = built(attached("overflow"))
    model.backbone.requires_grad_(False)
    assert differentiated_blocks(system, model, ids) == {0: False, 1: True, 2: True}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_finite_and_close(ids: Tensor, dtype: torch.dtype) -> None:
    part = batch(ids, [20, LENGTH - 20])
    exact, rough = (run(*built(attached("overflow"), dtype=kind), part) for kind in (torch.float64, dtype))
    error = (rough.tokens["losses"] - exact.tokens["losses"]).norm() / exact.tokens["losses"].norm()
    assert error < 0.05
    rough.sums["cross_entropy"].backward()


@pytest.mark.parametrize("attachment", ["residual", "mal", "mag", "mac"])
class TestBesideAnotherAttachment:
    """overflow on layer 2, another on layer 1 with heads of its own."""

    def config(self, attachment: str) -> RunConfig:
        own = {} if attachment == "mac" else {"heads": 2, "head_dim": 4}
        return with_memory(attached(attachment), overflow_layers=("upper1",), **own)

    def test_packed_or_apart_in_one_step_or_three(self, ids: Tensor, attachment: str) -> None:
        assert_packed_equals_apart(self.config(attachment), ids, [3, 24, 1, 20])
        system, model = built(self.config(attachment))
        assert [kind.attachment for kind in model.kinds.values()] == [attachment, "overflow"]
        assert_steps_equal_one(system, model, batch(ids, [7, LENGTH - 7]), (10, 21))

    def test_both_learn_recomputed_or_not(self, ids: Tensor, attachment: str) -> None:
        assert_recomputation_changes_nothing(self.config(attachment), ids, trainable=False)


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["every2", "upper2"])
def test_a_step_costs_little_more_than_without(layers: str, record_property: Callable[[str, object], None]) -> None:
    """CPU seconds of one row of 2,048 tokens through 8 layers of SmolLM2-135M's shape in bfloat16, window 256; with the
    memory off, the same blocks go back."""
    backbone = BackboneConfig(
        model_type="llama", tied=True, layers=8, width=576, heads=9, kv_heads=3, ffn=1536, vocabulary=49152
    )
    memory = MemoryConfig(layers=(layers,), attachment="overflow", rule="delta")
    sizes = MirasConfig(backbone=backbone, attention=AttentionConfig(window=256), memory=memory)
    config = RunConfig("", sizes, steps=1, batch_size=1, sequence_length=2048, lr=1.0)
    system, model = built(config, noisy=False, dtype=torch.bfloat16)
    model.backbone.requires_grad_(False)
    part = batch(torch.randint(49152, (2048,), generator=torch.Generator().manual_seed(0)), [2048])
    first = model.backbone.model.layers[min(model.kinds)]

    def seconds(memory: bool, learn: bool) -> float:
        def begin(_: Any, args: tuple[Tensor], kwargs: Any) -> Any:
            return (args[0].detach().requires_grad_(),), kwargs

        handle = first.register_forward_pre_hook(begin, with_kwargs=True)
        before = time.process_time()
        with torch.set_grad_enabled(learn):
            total = run(system, model, part, memory=memory).sums["cross_entropy"]
        if learn:
            total.backward()
        handle.remove()
        return time.process_time() - before

    found = {}
    for learn in (False, True):
        off, on = (min(seconds(memory, learn) for _ in range(4)) for memory in (False, True))
        found["training" if learn else "forward"] = on / off
        record_property(
            f"{layers}, {'training' if learn else 'forward'}", f"{on:.2f} s, off {off:.2f} s, {on / off:.2f}"
        )
    assert max(found.values()) < 1.3


def test_with_full_attention_nothing_leaves() -> None:
    with pytest.raises(UserError, match=r"--model.attention.kind full nothing leaves a window"):
        create(attached("overflow", "full"))
    with pytest.raises(UserError, match=r"--model.attention.kind full nothing leaves a window"):
        create(with_memory(attached("residual", "full"), overflow_layers=(2,)))


def test_overflow_layers_are_some_of_the_layers() -> None:
    with pytest.raises(UserError, match=r"--model.memory.overflow-layers 0: layer 0 is none of --model.memory.layers"):
        create(with_memory(attached("residual"), overflow_layers=(0,)))
