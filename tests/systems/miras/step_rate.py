"""How long a step of miras_smollm2 takes, and its own matrix products: `python -m tests.systems.miras.step_rate FOLDER
none|full CORES` prints it. A process of its own, as a training is: what other steps leave in the heap costs time."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.compilation import compile_blocks
from pipeline.config import RunConfig, replace
from pipeline.ds_config import precision_of
from pipeline.host.freed_memory import keep_freed_memory
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_smollm2
from pipeline.system import StepContext, System
from pipeline.systems.miras import create
from pipeline.systems.miras.config import MirasConfig
from pipeline.systems.miras.flops import compared_share
from pipeline.systems.miras.system import MirasSystem


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


def attention_products(system: MirasSystem, config: RunConfig) -> Iterator[tuple[tuple[int, int, int, int], int]]:
    """The products of a step inside attention, as (matrices, rows, inner, columns) and how often: the student's with
    the keys that its queries see, forward and backward, and the teacher's, of which the future is left out."""
    sizes, backbone = config.model, system.backbone
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


def measure(folder: str, distil: str, cores: int) -> dict[str, Any]:
    """Seconds of a step and of its products, and what follows."""
    recipe = replace(miras_smollm2(), model__distil=distil)
    assert isinstance(recipe.model, MirasConfig)
    backbone = dataclasses.replace(recipe.model.backbone, pretrained=folder)
    config = replace(recipe, model__backbone=backbone, data__tokenizer=folder)
    dtype, system = precision_of(config), create(config)
    assert isinstance(system, MirasSystem)
    torch.set_num_threads(cores)
    model = system.build()
    system.initialise(model, Topology())
    model.to(dtype)
    (phase,) = system.phases(model)
    trained = {name for group in phase.groups for name in group.parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    compile_blocks(config, system, model)
    (part,) = system.loader(phase, Topology()).next_step()

    def step() -> None:
        output = system.forward(model, part, {}, StepContext(Topology(), 0, "train", 1))
        torch.stack([value.float() for value in output.sums.values()]).sum().backward()
        model.zero_grad()

    shapes: Counter[tuple[int, int, int]] = Counter()
    for shape, times in products(system, model, config):
        shapes[shape] += times
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
    whole = min(steps)
    alone = sum(times * min(found) for times, found in zip(shapes.values(), with_weights, strict=True))
    inside = sum(times * min(found) for (_, times), found in zip(attended, within, strict=True))
    numbers = sum(times * 2 * tokens * inputs * outputs for (tokens, inputs, outputs), times in shapes.items())
    return {
        "precision": str(dtype).removeprefix("torch."),
        "tokens/s": round(config.batch_size * config.sequence_length / whole),
        "seconds a step": round(whole, 2),
        "seconds of its matrix products with weights": round(alone, 2),
        "TFLOP/s of these": round(numbers / alone / 1e12, 3),
        "seconds of those inside attention": round(inside, 2),
        "times its products": round(whole / (alone + inside), 3),
        "share of the products with weights": round(alone / whole, 3),
        "share of all products": round((alone + inside) / whole, 3),
    }


if __name__ == "__main__":
    # As commands do. The memory of the first steps is new to it.
    keep_freed_memory()
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
