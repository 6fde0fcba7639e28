"""The CUDA kernels of the memory step on a device, against the float64 token loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.ops.memory_step import memory_step
from tests.ops.memory_step_cases import BF16, FP32, assert_close, expected, make

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16)


def run(x: dict[str, Tensor | None], backend: str = "cuda", out: Tensor | None = None) -> list[Tensor]:
    """On the device: the read and both states after."""
    there = {name: None if z is None else z.cuda() for name, z in x.items()}
    y = memory_step(**there, out=out, backend=backend)  # type: ignore[arg-type]
    return [y, there["memory"], there["momentum"]]  # type: ignore[list-item]


def check(x: dict[str, Tensor | None], dtype: torch.dtype) -> None:
    actual = [z.cpu() for z in run(x)]
    assert actual[0].dtype == dtype
    assert_close(actual, expected(x), BF16 if dtype == torch.bfloat16 else FP32)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_dim", [32, 64, 128])
@pytest.mark.parametrize("value_dim", [16, 48, 128, 208])
def test_a_step_equals_the_token_loop(value_dim: int, key_dim: int, dtype: torch.dtype, momentum: bool) -> None:
    check(make(3, 16, key_dim, value_dim, dtype=dtype, momentum=momentum), dtype)


@pytest.mark.small
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_dim", [32, 64, 128])
def test_every_kernel_on_a_few_memories(key_dim: int, dtype: torch.dtype, momentum: bool) -> None:
    """A whole tile of columns and half of one."""
    check(make(1, 2, key_dim, 48, dtype=dtype, momentum=momentum), dtype)


def test_no_memories() -> None:
    y, memory, _ = run(make(0, 4, 64, 64))
    assert y.shape == (0, 4, 64) and memory.shape == (0, 4, 64, 64)


def test_it_runs_on_the_stream_of_the_caller() -> None:
    x = make(4, 16, 128, 128)
    wanted = run(x)
    torch.cuda.synchronize()
    there = {name: None if z is None else z.cuda() for name, z in x.items()}
    late = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) as _, torch.no_grad():
        v = torch.zeros_like(there["v"])  # type: ignore[arg-type]
        # Work that is late on this stream alone: a kernel on another one would read zeros.
        for _ in range(20):
            late = late @ late * 1e-4
        v.copy_(there["v"])  # type: ignore[arg-type]
        y = memory_step(**{**there, "v": v}, backend="cuda")  # type: ignore[arg-type]
    torch.cuda.synchronize()
    assert torch.equal(y, wanted[0])


def test_it_is_captured_in_a_graph() -> None:
    """As a decoder would: the same buffers at every replay, and states that go on."""
    x = make(2, 8, 64, 64)
    there = {name: None if z is None else z.cuda() for name, z in x.items()}
    out = torch.empty_like(there["v"])  # type: ignore[arg-type]
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        memory_step(**there, out=out)  # type: ignore[arg-type]
    for name in ("memory", "momentum"):
        there[name].copy_(x[name])  # type: ignore[union-attr, arg-type]
    first = run(x)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip((out, there["memory"], there["momentum"]), first, strict=True))  # type: ignore[arg-type]
    second = run(x | {"memory": first[1], "momentum": first[2]})
    graph.replay()
    assert torch.equal(out, second[0])


def test_auto_takes_the_kernel() -> None:
    x = make(2, 4, 64, 64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert all(torch.equal(a, b) for a, b in zip(run(x, "auto"), run(x), strict=True))
