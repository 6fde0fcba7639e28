"""Every attention backend that this GPU can run equals the definition in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from pipeline.ops.attention import (
    Rope,
    choose_attention,
    full_attention,
    plan_full_attention,
    plan_window_attention,
    window_attention,
)
from tests.ops.attention_reference import pack, reference_attention, relative_error

pytestmark = pytest.mark.gpu

DIM, HEADS, KV_HEADS = 64, 4, 2
ROPE = Rope(10000.0 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM))
DOCUMENTS = [[3, 150, 107, 40], [300]]
WIDTH = 32
FLASH = ("flash2", "flash3", "flash4")
# Norm-wise: the rounding of inputs is shared with the reference, that of weights and outputs is not.
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 1.5e-2}


def name_of(value: object) -> str:
    return f"{value} sinks" if isinstance(value, int) else str(value).removeprefix("torch.")


def choose(kind: str, sinks: int, dtype: torch.dtype, backend: str) -> str:
    try:
        return choose_attention(kind, sinks, "cuda", dtype, DIM, backend)
    except ValueError as refusal:
        pytest.skip(str(refusal))


def inputs(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """q, k, v on the device, the same values in float64 on the host, segment ids and positions on the device."""
    ids, positions = pack(DOCUMENTS)
    generator = torch.Generator().manual_seed(0)
    host = [torch.randn(*ids.shape, n, DIM, generator=generator).to(dtype) for n in (HEADS, KV_HEADS, KV_HEADS)]
    device = [x.cuda().requires_grad_() for x in host]
    return device, [x.double().requires_grad_() for x in host], ids.cuda(), positions.cuda()


def assert_close(out, device, want, host, dtype):
    probe = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    have = torch.autograd.grad(out, device, probe.cuda())
    assert out.dtype == dtype
    assert relative_error(out, want) < TOLERANCES[dtype]
    for a, b in zip(have, torch.autograd.grad(want, host, probe.double()), strict=True):
        assert relative_error(a, b) < 2 * TOLERANCES[dtype]


# Only flex has float32, and only flex is compiled, which takes most of the time here: it gets float32 once per kind.
FULL = [("flex", torch.bfloat16), ("flex", torch.float32), *((name, torch.bfloat16) for name in FLASH)]
WINDOW = [
    ("flex", 0, torch.bfloat16),
    ("flex", 4, torch.bfloat16),
    ("flex", 4, torch.float32),
    *((name, 0, torch.bfloat16) for name in FLASH),
]
# Sinks are rebased on a carry only where they are; a backend without them has its carry alone.
CARRY = [("flex", 4), *((name, 0) for name in FLASH)]


@pytest.mark.parametrize(("backend", "dtype"), FULL, ids=name_of)
def test_full_attention(backend, dtype):
    backend = choose("full", 0, dtype, backend)
    device, host, ids, positions = inputs(dtype)
    plan = plan_full_attention(ids, positions, rope=ROPE, backend=backend, dtype=dtype)
    want = reference_attention(*host, ids.cpu(), positions.cpu(), ROPE.inverse_frequencies)
    assert_close(full_attention(*device, plan), device, want, host, dtype)


@pytest.mark.parametrize(("backend", "sinks", "dtype"), WINDOW, ids=name_of)
def test_window_attention(backend, sinks, dtype):
    backend = choose("window", sinks, dtype, backend)
    device, host, ids, positions = inputs(dtype)
    out = window_steps(device, ids, positions, [], sinks=sinks, backend=backend, dtype=dtype)
    want = reference_attention(*host, ids.cpu(), positions.cpu(), ROPE.inverse_frequencies, WIDTH, sinks)
    assert_close(out, device, want, host, dtype)


@pytest.mark.parametrize("cuts", [[1, 130], [152, 155, 290]], ids=str)
@pytest.mark.parametrize(("backend", "sinks"), CARRY, ids=name_of)
def test_window_attention_with_a_carry(backend, sinks, cuts):
    """The carry is a constant: only the forward pass of several steps equals that of one."""
    dtype = torch.bfloat16
    backend = choose("window", sinks, dtype, backend)
    device, host, ids, positions = inputs(dtype)
    out = window_steps(device, ids, positions, cuts, sinks=sinks, backend=backend, dtype=dtype)
    want = reference_attention(*host, ids.cpu(), positions.cpu(), ROPE.inverse_frequencies, WIDTH, sinks)
    assert relative_error(out, want) < TOLERANCES[dtype]


def window_steps(device, ids, positions, cuts, *, sinks, backend, dtype):
    """The outputs of steps that end at ``cuts`` and at the end, each with the carry of the one before."""
    carry, outs = None, []
    for begin, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        plan = plan_window_attention(
            ids[:, begin:end],
            positions[:, begin:end],
            rope=ROPE,
            window=WIDTH,
            sinks=sinks,
            carry=carry,
            backend=backend,
            dtype=dtype,
        )
        out, carry = window_attention(*(x[:, begin:end] for x in device), plan, carry)
        outs.append(out)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("backend", ["flex"])
def test_nothing_of_window_attention_waits_for_the_device_after_the_plan(backend):
    device, _, ids, positions = inputs(torch.bfloat16)
    common = {"rope": ROPE, "backend": backend, "dtype": torch.bfloat16}
    plan = plan_window_attention(ids, positions, window=WIDTH, sinks=4, carry=None, **common)
    window_attention(*device, plan, None)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        window_attention(*device, plan, None)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
