"""`--compile` makes one graph of a block, which serves all layers and steps, and changes no number beyond rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from pipeline import compilation
from pipeline.callbacks.metrics import read_rows
from pipeline.compilation import check_compile, compile_blocks
from pipeline.config import RunConfig, replace
from pipeline.data.batch import TokenBatch
from pipeline.errors import UserError
from pipeline.lm.config import AttentionConfig
from pipeline.parallel.topology import Topology
from pipeline.recipes import all_recipes
from pipeline.recipes.cvfp import cvfp_tiny
from pipeline.recipes.miras import miras_tiny
from pipeline.recipes.olmo import olmo_tiny
from pipeline.system import StepContext, System, create_system
from pipeline.systems.miras.config import MemoryConfig, SlotsConfig
from tests.launch.harness import launch

ROWS, LENGTH = 2, 16


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts the graphs that are made; their forward and backward passes are traced, and run as they are."""
    found = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compilation, "BACKEND", found)
    torch._dynamo.reset()
    counters.clear()
    yield found
    torch._dynamo.reset()


def config(**changes: object) -> RunConfig:
    return replace(olmo_tiny(), batch_size=ROWS, sequence_length=LENGTH, compile=True, **changes)


def with_backbone(run: RunConfig, **sizes: object) -> RunConfig:
    backbone = dataclasses.replace(run.model.backbone, layers=3, width=32, heads=4, kv_heads=4, ffn=48, **sizes)  # type: ignore[attr-defined]
    return dataclasses.replace(run, model=dataclasses.replace(run.model, backbone=backbone))  # type: ignore[call-arg]


def built(run: RunConfig) -> tuple[System, nn.Module]:
    system = create_system(run)
    model = system.build()
    system.initialise(model, Topology())
    return system, model.double()


def loss(system: System, model: nn.Module, seed: int) -> Tensor:
    ids = torch.randint(260, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    batch = TokenBatch(ids[:, :-1], ids[:, 1:], torch.zeros_like(positions), positions, torch.arange(ROWS))
    output = system.forward(model, batch, {}, StepContext(Topology(), 0, "train", seed))
    return torch.stack(list(output.sums.values())).sum()


@pytest.mark.parametrize("model_type", ["olmo", "olmo2"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_block_is_one_graph_for_all_layers_and_steps(
    model_type: str, recompute: bool, counter: CompileCounterWithBackend
) -> None:
    run = with_backbone(config(activation_checkpointing=recompute), model_type=model_type)
    (plain_system, plain), (system, compiled) = built(run), built(run)
    assert compile_blocks(run, system, compiled) == 3
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for seed in range(1, 4):
        expected, found = loss(plain_system, plain, seed), loss(system, compiled, seed)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        gradients = torch.autograd.grad(found, list(compiled.parameters()))
        for one, other in zip(gradients, torch.autograd.grad(expected, list(plain.parameters())), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert counter.frame_count == 1
    with torch.no_grad():
        torch.testing.assert_close(loss(system, compiled, 9), loss(plain_system, plain, 9), rtol=1e-12, atol=0)
    assert counter.frame_count == 2, "without gradients it is a graph of its own"
    for model in (plain, compiled):
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loss(system, compiled, 9), loss(plain_system, plain, 9), rtol=0, atol=0)
    assert counter.frame_count == 2, "evaluations run as they are"
    assert not counters["graph_break"]


@pytest.mark.parametrize("attachment", ["residual", "slots"])
@pytest.mark.parametrize("distil", ["none", "full"])
def test_norms_and_ffns_beside_a_memory_are_compiled(
    attachment: str, distil: str, counter: CompileCounterWithBackend
) -> None:
    """Frozen, the first layer has nothing to differentiate, and a teacher runs without gradients: other graphs."""
    run = replace(miras_tiny(), batch_size=ROWS, sequence_length=LENGTH, compile=True, parallel__sequence=1)
    memory = MemoryConfig(
        layers=(1, 2), heads=4, head_dim=8, attachment=attachment, slots=SlotsConfig(count=4, chunk=4, reach=8)
    )
    run = with_backbone(
        replace(run, model__memory=memory, model__attention=AttentionConfig(window=4)), trainable=distil == "none"
    )
    run = replace(run, model__distil=distil)
    (plain_system, plain), (system, compiled) = built(run), built(run)
    # Of olmo2: a feed-forward network and four norms in each of three layers.
    assert compile_blocks(run, system, compiled) == 3 * (1 + 4)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    counts = []
    for model in (plain, compiled):
        model.backbone.requires_grad_(distil == "none")
    for seed in range(1, 4):
        expected, found = loss(plain_system, plain, seed), loss(system, compiled, seed)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        gradients, others = (
            torch.autograd.grad(one, [each for each in model.parameters() if each.requires_grad], allow_unused=True)
            for one, model in ((found, compiled), (expected, plain))
        )
        for one, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        counts.append(counter.frame_count)
    assert counts == [2 if distil == "none" else 6] * 3, "of networks and of norms, at every step"
    assert not counters["graph_break"]


def test_which_recipes_compile() -> None:
    assert [name for name, recipe in all_recipes().items() if recipe().compile] == ["miras_smollm2"]


def test_a_block_that_is_no_single_graph_is_no_block_to_compile(counter: CompileCounterWithBackend) -> None:
    run = with_backbone(config())
    system, model = built(run)
    for layer in model.backbone.model.layers:  # type: ignore[union-attr]
        layer.mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    compile_blocks(run, system, model)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        loss(system, model, 1)


def test_without_the_flag_nothing_is_compiled(counter: CompileCounterWithBackend) -> None:
    run = dataclasses.replace(with_backbone(config()), compile=False)
    system, model = built(run)
    assert compile_blocks(run, system, model) == 0
    loss(system, model, 1)
    assert counter.frame_count == 0


def refusal(run: RunConfig, stage: int = 0, degree: int = 1) -> str:
    topology, ds_config = Topology(world=degree, sequence=degree), {"zero_optimization": {"stage": stage}}
    with pytest.raises(UserError) as caught:
        check_compile(run, create_system(run), topology, ds_config)
    message = str(caught.value)
    assert message.startswith("--compile") and "\n" not in message
    return message


def test_what_cannot_be_compiled_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config()
    for stage in range(3):
        check_compile(run, create_system(run), Topology(), {"zero_optimization": {"stage": stage}})
    assert "give --zero zero2 or less" in refusal(replace(run, zero="zero3"), stage=3)
    assert "leave one of them out" in refusal(run, degree=2)
    assert "--data.document-mask on a CPU" in refusal(replace(run, data__document_mask=True))
    assert "no blocks that can be compiled" in refusal(replace(cvfp_tiny(), compile=True))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler (CXX=no-such-compiler)" in refusal(run)
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda _: "/nowhere")
    assert "headers, which are not in /nowhere: install them (python3-dev), or give --no-compile" in refusal(run)
    check_compile(dataclasses.replace(run, compile=False), create_system(run), Topology(), {})


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero0", "zero2"])
def test_two_ranks_train_alike_with_compiled_blocks(zero: str, tmp_path: Path, record_property: Any) -> None:
    found = {}
    for flag in ("--compile", "--no-compile"):
        words = [
            "train", "olmo_tiny", flag, "--zero", zero, "--steps", "5", "--sequence-length", "64", "--batch-size", "2",
            "--model.backbone.layers", "2", "--model.backbone.width", "64", "--activation-checkpointing",
            "--eval-every", "0", "--evaluation.steps", "1", "--report.no-plots", "--output-dir", str(tmp_path / flag),
        ]  # fmt: skip
        done = launch(2, "pipeline", *words, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        found[flag] = [row["loss"] for row in read_rows(tmp_path / flag / "metrics.jsonl")]
    worst = max(abs(a / b - 1) for a, b in zip(found["--compile"], found["--no-compile"], strict=True))
    record_property(f"relative difference of losses, {zero}", f"{worst:.1e}")
    assert len(found["--compile"]) == 7 and worst < 1e-5
