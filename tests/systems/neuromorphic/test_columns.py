from __future__ import annotations

import torch
import torch.nn.functional as F

from pipeline.systems.neuromorphic.columns import (
    ColumnFeedForward,
    ColumnLinear,
    ColumnNorm,
    SharedColumnLinear,
    unit,
)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module.double()


def test_a_map_of_columns_is_a_linear_map_of_each() -> None:
    module, x = filled(ColumnLinear(3, 4, 5)), torch.randn(3, 2, 6, 4, dtype=torch.float64)
    wanted = torch.stack([F.linear(x[b], module.weight[b].T, module.bias[b]) for b in range(3)])
    torch.testing.assert_close(module(x), wanted)
    torch.testing.assert_close(module(x[..., :1], x[..., 1:]), wanted)
    bare = filled(ColumnLinear(3, 4, 5, bias=False))
    for parts in ((x,), x.split([3, 1], -1)):
        torch.testing.assert_close(bare(*parts), torch.stack([x[b] @ bare.weight[b] for b in range(3)]))


def test_a_map_of_one_shared_input_is_a_linear_map_of_each_column() -> None:
    module, x = filled(SharedColumnLinear(3, 4, 5)), torch.randn(2, 6, 4, dtype=torch.float64)
    wanted = torch.stack([F.linear(x, module.weight[b], module.bias[b]) for b in range(3)])
    torch.testing.assert_close(module(x), wanted)
    assert module(x).is_contiguous()


def test_norm_and_feed_forward_are_those_of_each_column() -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    norm, part = filled(ColumnNorm(2, 4)), filled(ColumnFeedForward(2, 4))
    torch.testing.assert_close(
        norm(x), torch.stack([F.layer_norm(x[b], (4,), norm.weight[b], norm.bias[b]) for b in range(2)])
    )

    def one(b: int) -> torch.Tensor:
        normed = F.layer_norm(x[b], (4,), part.norm_weight[b], part.norm_bias[b])
        inner = F.gelu(F.linear(normed, part.inner_weight[b].T, part.inner_bias[b]))
        return x[b] + F.linear(inner, part.outer_weight[b].T, part.outer_bias[b])

    wanted = torch.stack([one(b) for b in range(2)])
    torch.testing.assert_close(part(x), wanted)
    leaves = [x, *part.parameters()]
    cotangent = torch.randn_like(wanted)
    found, known = (torch.autograd.grad(y, leaves, cotangent) for y in (part(x), wanted))
    for one_found, one_known in zip(found, known, strict=True):
        torch.testing.assert_close(one_found, one_known)


def test_unit_vectors_have_length_one_and_zero_stays_zero() -> None:
    x = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(unit(x).norm(dim=-1), torch.ones(7, dtype=torch.float64), rtol=1e-7, atol=0)
    assert not unit(torch.zeros(2, 3)).any()
