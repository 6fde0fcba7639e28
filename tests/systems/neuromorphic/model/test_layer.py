from __future__ import annotations

import pytest
import torch

from pipeline.systems.neuromorphic.model.layer import GatedLayer
from tests.systems.neuromorphic.test_columns import filled

B, N, P, H = 2, 3, 5, 4


@pytest.mark.parametrize("scaled", [True, False])
def test_the_scan_is_a_loop_over_tokens_with_resets(scaled: bool) -> None:
    layer = filled(GatedLayer(B, H, scaled=scaled))
    generator = torch.Generator().manual_seed(1)
    x, y, context = (torch.randn(B, N, P, n, generator=generator).double() for n in (H, H, 2 * H))
    surprise, hidden = (
        torch.rand(N, P, generator=generator).double(),
        torch.randn(N, B, H, generator=generator).double(),
    )
    segments = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 2], [4, 5, 5, 5, 5]])
    out, after, gates = layer(x, y, context, surprise, hidden, segments)

    u = torch.cat([x, y, context], -1)
    mixed = torch.einsum("bnpi,bio->bnpo", u, layer.gates.weight) + layer.gates.bias[:, None, None]
    mixed = mixed + torch.einsum("np,bo->bnpo", surprise, layer.surprise)
    a, b = mixed[..., :H].sigmoid(), mixed[..., H:].tanh()
    h, states = hidden.transpose(0, 1), []
    for t in range(P):
        if t:
            h = h * (segments[:, t] == segments[:, t - 1]).double()[None, :, None]
        h = a[:, :, t] * h + b[:, :, t] * ((1 - a[:, :, t]) if scaled else 1)
        states.append(h)
    h = torch.stack(states, 2)
    torch.testing.assert_close(gates.h, h)
    torch.testing.assert_close(gates.a, a)
    torch.testing.assert_close(after, h[:, :, -1].transpose(0, 1))
    torch.testing.assert_close(out, layer.feed_forward(layer.norm(layer.output(h) + x)))
    found = gates.statistics()
    torch.testing.assert_close(found["h_norm"], h.norm(dim=-1).mean((1, 2)).float())
    saturated = ((a < 0.05) | (a > 0.95)).float().mean((1, 2, 3))
    torch.testing.assert_close(found["gate_a_saturation"], saturated)


def test_a_factor_near_one_is_not_rounded_to_one_in_bfloat16() -> None:
    layer = filled(GatedLayer(1, H, scaled=True)).bfloat16()
    with torch.no_grad():
        layer.gates.weight.zero_()
        layer.gates.bias[:, :H] = 7.0
    zeros = torch.zeros(1, 1, 3, H, dtype=torch.bfloat16)
    arguments = (zeros, zeros, torch.cat([zeros, zeros], -1), torch.zeros(1, 3))
    _, after, gates = layer(*arguments, torch.ones(1, 1, H), torch.zeros(1, 3, dtype=torch.int64))
    assert after.dtype == gates.a.dtype == torch.float32 and float(gates.a.detach().max()) < 0.9995


def test_the_state_stays_within_one_where_b_is_scaled() -> None:
    layer = filled(GatedLayer(B, H, scaled=True))
    x = 10 * torch.randn(B, N, 40, H, dtype=torch.float64)
    none = torch.zeros(N, 40, dtype=torch.int64)
    _, _, gates = layer(x, x, torch.cat([x, x], -1), torch.zeros(N, 40).double(), x.new_zeros(N, B, H), none)
    assert float(gates.h.detach().abs().max()) <= 1
