"""`--compile` gives the numbers that the model gives without, with the code that is generated for the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.compilation import compile_blocks
from pipeline.parallel.topology import Topology
from pipeline.system import StepContext
from tests.systems.neuromorphic.harness import created, documents, small


@pytest.mark.slow
@pytest.mark.parametrize("phase", "AC")
def test_compiled_layers_train_alike(phase: str, tmp_path: Path, record_property: Any) -> None:
    """In float32, over two steps of several spans: the second begins with what the first wrote."""
    documents(tmp_path / "documents")
    found: dict[bool, tuple[list[float], dict[str, torch.Tensor]]] = {}
    for compiled in (False, True):
        system = created(small(tmp_path, sequence_length=32, compile=compiled))
        model = system.build()
        system.initialise(model, Topology())
        assert compile_blocks(system.config, system, model) == 2 * compiled
        of_phase = next(each for each in system.phases(model) if each.name == phase)
        loader = system.loader(of_phase, Topology())
        carry: Any = {}
        losses = []
        for step in (1, 2):
            (batch,) = loader.next_step()
            output = system.forward(model, batch, carry, StepContext(Topology(), 0, phase, step))
            labels = system.count(batch)["cross_entropy"]
            mean = output.sums["cross_entropy"] / labels
            losses.append(mean.item())
            carry = {
                name: dataclasses.replace(entry, tensor=entry.tensor.detach()) for name, entry in output.carry.items()
            }
        mean.backward()
        found[compiled] = losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    (plain, expected), (losses, gradients) = found[False], found[True]
    worst = max(abs(one / other - 1) for one, other in zip(losses, plain, strict=True))
    record_property(f"relative difference of losses of columns, phase {phase}", f"{worst:.1e}")
    assert worst < 1e-5
    assert gradients.keys() == expected.keys() and len(gradients) > 40
    size = float(torch.nn.utils.get_total_norm(list(expected.values())))
    apart = float(torch.nn.utils.get_total_norm([gradients[n] - expected[n] for n in expected]))
    record_property(f"relative difference of gradients of columns, phase {phase}", f"{apart / size:.1e}")
    assert apart < 1e-5 * size
    for name, gradient in expected.items():
        tolerance = 1e-4 * float(gradient.norm()) + 1e-6 * size
        assert float((gradients[name] - gradient).norm()) <= tolerance, name
