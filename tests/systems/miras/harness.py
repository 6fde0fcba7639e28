"""A whole small model on one rank: building it, its batches, running it, and what several tests ask of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import fill
from pipeline.system import Carry, StepContext, StepOutput
from pipeline.systems.miras import create
from pipeline.systems.miras.model import MirasModel
from pipeline.systems.miras.system import MirasSystem
from tests.launch.parity_main import LENGTH, VOCABULARY, randomise

CONTEXT = StepContext(Topology(), 0, "train", 1)


def tokens() -> Tensor:
    """Ids [LENGTH] of the document or documents that the tests read."""
    return torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(3))


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
    if dtype == torch.float64:
        keep_norms_precise(model)
    return system, model.to(dtype)


def keep_norms_precise(model: MirasModel) -> None:
    """transformers computes norms in float32, whose rounding would hide what is compared in float64."""
    for module in model.backbone.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(precise_norm, module)


def precise_norm(module: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def batch(ids: Tensor, lengths: list[int]) -> TokenBatch:
    """One row of documents of the given lengths, every token but a document's first counted."""
    segments = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])
    positions = torch.cat([torch.arange(length) for length in lengths])
    labels = torch.cat([ids[1:], torch.tensor([IGNORED])])
    labels[:-1][segments[1:] != segments[:-1]] = IGNORED
    return TokenBatch(*(x.unsqueeze(0) for x in (ids, labels, segments, positions)), torch.tensor([0]))


def cut(whole: TokenBatch, start: int, end: int) -> TokenBatch:
    parts = (getattr(whole, name)[:, start:end] for name in ("input_ids", "labels", "segment_ids", "positions"))
    return TokenBatch(*parts, whole.streams)


def run(
    system: MirasSystem, model: MirasModel, part: TokenBatch, carry: Carry | None = None, **options: bool
) -> StepOutput:
    return system.forward(model, part, carry or {}, dataclasses.replace(CONTEXT, options=options))


def run_in_steps(
    system: MirasSystem, model: MirasModel, whole: TokenBatch, cuts: Sequence[int]
) -> tuple[Tensor, Carry]:
    """Losses of every token [LENGTH], and the carry, when a step ends at every cut."""
    carry: Carry = {}
    found = []
    for start, end in zip((0, *cuts), (*cuts, LENGTH), strict=True):
        output = run(system, model, cut(whole, start, end), carry)
        carry = output.carry
        found.append(output.tokens["losses"][0])
    return torch.cat(found), carry


def assert_memory_adds_nothing(system: MirasSystem, model: MirasModel, part: TokenBatch) -> None:
    """The losses are those of the backbone, to the bit."""
    on, off = (run(system, model, part, memory=memory).tokens["losses"] for memory in (True, False))
    assert torch.equal(on, off)


def assert_packed_equals_apart(config: RunConfig, ids: Tensor, lengths: list[int]) -> None:
    """Losses and gradients of documents in one row are those of a row each."""
    system, model = built(config)
    run(system, model, batch(ids, lengths)).sums["cross_entropy"].backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    together = run(system, model, batch(ids, lengths)).tokens["losses"][0]
    model.zero_grad()
    apart = []
    for piece in ids.split(lengths):
        output = run(system, model, batch(piece, [len(piece)]))
        output.sums["cross_entropy"].backward()
        apart.append(output.tokens["losses"][0])
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-9, atol=1e-11, msg=name)


def assert_steps_equal_one(system: MirasSystem, model: MirasModel, whole: TokenBatch, cuts: Sequence[int]) -> None:
    """Losses and carry of a row do not depend on where its steps end."""
    expected = run(system, model, whole)
    found, carry = run_in_steps(system, model, whole, cuts)
    torch.testing.assert_close(found, expected.tokens["losses"][0], rtol=1e-9, atol=1e-9)
    assert carry.keys() == expected.carry.keys()
    for name, entry in expected.carry.items():
        torch.testing.assert_close(carry[name].tensor, entry.tensor, rtol=1e-9, atol=1e-9, msg=name)


def learn(system: MirasSystem, model: MirasModel, ids: Tensor) -> None:
    """The backward pass of two documents."""
    run(system, model, batch(ids, [20, LENGTH - 20])).sums["cross_entropy"].backward()


def assert_recomputation_changes_nothing(config: RunConfig, ids: Tensor, *, trainable: bool = True) -> None:
    """Gradients with activation checkpointing are those without; a frozen backbone has none."""
    gradients = []
    for recompute in (False, True):
        system, model = built(dataclasses.replace(config, activation_checkpointing=recompute))
        model.backbone.requires_grad_(trainable)
        learn(system, model, ids)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (name.startswith("backbone.") and not trainable)
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-12, atol=1e-12, msg=name)


def learning_in_two_steps(config: RunConfig, ids: Tensor) -> tuple[set[str], set[str], set[str]]:
    """Names of the memory's parameters with a gradient at step 0 and at the next, and of all of them."""
    system, model = built(config, noisy=False)
    optimizer = torch.optim.SGD(model.memory.parameters(), lr=0.1)
    learning = []
    for _ in range(2):
        optimizer.zero_grad()
        learn(system, model, ids)
        learning.append({name for name, p in model.memory.named_parameters() if p.grad.abs().max() > 0})
        optimizer.step()
    first, second = learning
    return first, second, {name for name, _ in model.memory.named_parameters()}


def differentiated_blocks(system: MirasSystem, model: MirasModel, ids: Tensor) -> dict[int, bool]:
    """Whether each block of the backbone gave something to differentiate, after a backward pass."""
    differentiated: dict[int, bool] = {}
    for index, layer in enumerate(model.backbone.model.layers):
        layer.register_forward_hook(lambda _, __, out, index=index: differentiated.update({index: out.requires_grad}))
    run(system, model, batch(ids, [LENGTH])).sums["cross_entropy"].backward()
    return differentiated
