"""Full attention on the native kernel, where nothing is differentiated, against SDPA in float64."""

from __future__ import annotations

import pytest
import torch

from pipeline.ops import attention_bands, native
from pipeline.ops.attention import Rope, full_attention, plan_full_attention

pytestmark = pytest.mark.skipif(
    not native.load("cpu") or torch.ops.mnemos.cpu_isa() != "avx512_bf16",
    reason="the kernel is used where the processor multiplies pairs of bfloat16",
)


@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize("lengths", [[[1300]], [[700, 3, 597], [1, 1299]], [[100] * 13]], ids=str)
def test_it_is_full_attention_within_documents(
    lengths: list[list[int]], dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = torch.Generator().manual_seed(0)
    rope = Rope(100.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim), attention_scaling=1.2)
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    q, k, v = (torch.randn(*segments.shape, heads, dim, generator=rng).bfloat16() for heads in (4, 2, 2))
    calls: list[int] = []
    called = attention_bands.causal_attention

    def counted(*arguments: object) -> torch.Tensor:
        calls.append(1)
        return called(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(attention_bands, "causal_attention", counted)
    outs = []
    for dtype in (torch.bfloat16, torch.float64):
        plan = plan_full_attention(segments, positions, rope=rope, backend="sdpa", dtype=dtype)
        outs.append(full_attention(q.to(dtype), k.to(dtype), v.to(dtype), plan).double())
    assert calls == [1], "bfloat16 alone takes the kernel"
    assert (outs[0] - outs[1]).norm() < 1e-2 * outs[1].norm()
    plan = plan_full_attention(segments, positions, rope=rope, backend="sdpa", dtype=torch.bfloat16)
    full_attention(q.requires_grad_(), k, v, plan).sum().backward()
    with torch.no_grad():
        full_attention(q, k, v, plan)
    assert calls == [1, 1], "and nothing that is differentiated does"
