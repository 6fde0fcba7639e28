"""Weights that are packed once for a recurrence, beside products in float64."""

from __future__ import annotations

import pytest
import torch

from pipeline.systems.cvfp.model.packed import FEWEST, packed_relu
from tests.systems.cvfp.small import rows, small, starts

packs = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN is not in this build of torch")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@packs
def test_it_computes_the_layer_and_its_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = normal(48, 32), normal(48, seed=1)
    layer = packed_relu(weight.float(), bias.float(), 24, FEWEST)
    with monkeypatch.context() as without:
        # Neither of them is what it calls: the packed product is.
        without.setattr(torch.nn.functional, "linear", None)
        without.setattr(torch.nn.functional, "relu", None)
        found = {count: layer(normal(count, 32, seed=2).float()) for count in (24, 23, 7, 1)}
    for count, value in found.items():
        expected = (normal(count, 32, seed=2) @ weight.T + bias).clamp_min(0)
        torch.testing.assert_close(value.double(), expected, atol=2e-5, rtol=1e-5)
        assert (value == 0).any() and (value > 0).any()


@pytest.mark.parametrize("calls", [1, FEWEST])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_not_packed_is_the_same_layer(dtype: torch.dtype, calls: int) -> None:
    weight, bias, x = (normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate([(48, 32), (48,), (5, 32)]))
    expected = torch.relu(torch.nn.functional.linear(x, weight, bias))
    assert torch.equal(packed_relu(weight, bias, 5, calls)(x), expected)


@packs
def test_contexts_of_packed_weights_are_those_of_float64_at_the_present_weights() -> None:
    """Of documents of different lengths, so of fewer and fewer rows; and again when an update has moved the weights."""
    exact, narrow = small(), small().float()
    ids, mask = rows([40, 17, 33, 2, 40])
    start = starts(5)
    for _ in range(2):
        expected = exact(ids, start=start, mask=mask).contexts
        found = narrow(ids, start=start.float(), mask=mask).contexts
        torch.testing.assert_close(found[mask].double(), expected[mask], atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            for model in (exact, narrow):
                for parameter in model.parameters():
                    parameter.mul_(1.25)
    assert (exact(ids, start=start, mask=mask).contexts - expected)[mask].abs().max() > 1e-2
