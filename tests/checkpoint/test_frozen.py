"""The hash of frozen weights is that of their names and values, and of nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.checkpoint.frozen import frozen_weights
from pipeline.parallel.topology import Topology


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))


def facts(module: nn.Module, trained: set[str] | None = None) -> dict[str, object] | None:
    return frozen_weights(module, {"1.weight", "1.bias"} if trained is None else trained, Topology())


def test_it_counts_what_is_not_trained() -> None:
    found = facts(model())
    assert found is not None and found["parameters"] == 8
    assert facts(model()) == found
    assert facts(model(), set()) != found
    assert facts(model(), {name for name, _ in model().named_parameters()}) is None


@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
def test_one_bit_of_a_frozen_weight_changes_it(name: str) -> None:
    other = model()
    with torch.no_grad():
        other.get_parameter(name).view(-1).view(torch.int32)[0] ^= 1
    assert facts(other) != facts(model())


def test_trained_weights_do_not_matter() -> None:
    other = model()
    nn.init.zeros_(other.get_parameter("1.weight"))
    assert facts(other) == facts(model())


def test_bfloat16_weights_are_the_same_in_float32() -> None:
    low = model().to(torch.bfloat16)
    assert facts(low) == facts(low.float())
