"""The CUDA kernels of the affine scan on a device, against the float64 token loop."""

import pytest
import torch
from torch import Tensor

from pipeline.ops.affine_scan import affine_scan
from tests.ops.affine_scan_reference import affine_loop, affine_loop_gradients

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("h", "after", "grad a", "grad b", "grad state")
# Short and long, split in time and not, in pairs of features and not.
SHAPES = [(2, 1, 3), (1, 63, 5), (2, 65, 6), (2, 1000, 130), (1, 5000, 1), (1, 64, 16_500), (4, 300, 8192)]


def make(shape: tuple[int, ...], a: torch.dtype, b: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Leaves a, b and state; cotangents of h and the last state; segment ids."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    state = (shape[0], *shape[2:])
    x = [torch.tanh(2 * normal(*shape)).to(a), normal(*shape).to(b), normal(*state)]
    cotangents = [normal(*shape).to(b), normal(*state)]
    ids = (torch.rand(shape[:2], generator=rng) < 0.01).int().cumsum(dim=1)
    return [z.cuda().requires_grad_() for z in x], [z.cuda() for z in cotangents], ids.cuda()


def results(x: list[Tensor], cotangents: list[Tensor], ids: Tensor | None, backend: str = "cuda") -> list[Tensor]:
    outputs = affine_scan(x[0], x[1], state=x[2], segment_ids=ids, backend=backend)
    return [*outputs, *torch.autograd.grad(outputs, x, cotangents)]


@pytest.mark.parametrize("segmented", [False, True], ids=["one segment", "segments"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("b", DTYPES, ids=str)
@pytest.mark.parametrize("a", DTYPES, ids=str)
def test_values_and_gradients_equal_the_token_loop(
    a: torch.dtype, b: torch.dtype, shape: tuple[int, ...], segmented: bool
) -> None:
    check(shape, a, b, segmented)


@pytest.mark.small
@pytest.mark.parametrize("shape", [(2, 41, 3), (2, 41, 6), (2, 300, 5), (2, 300, 10)], ids=str)
@pytest.mark.parametrize("b", DTYPES, ids=str)
@pytest.mark.parametrize("a", DTYPES, ids=str)
def test_every_kernel_on_a_few_tokens(a: torch.dtype, b: torch.dtype, shape: tuple[int, ...]) -> None:
    """Both passes in every dtype, split in time and not, in pairs of features and not, with segments."""
    check(shape, a, b, segmented=True)


def check(shape: tuple[int, ...], a: torch.dtype, b: torch.dtype, segmented: bool) -> None:
    x, cotangents, ids = make(shape, a, b)
    given = ids if segmented else None
    actual = results(x, cotangents, given)
    # On the CPU: on the device every token would be a dozen launches, each of which compute-sanitizer slows down.
    a_host, b_host, state_host, *cotangents = (z.detach().cpu() for z in (*x, *cotangents))
    given = None if given is None else given.cpu()
    h, after = affine_loop(a_host, b_host, state=state_host, segment_ids=given)
    expected = [h, after, *affine_loop_gradients(a_host, h, state_host, *cotangents, given)]
    for name, y, z in zip(NAMES, actual, expected, strict=True):
        error = float((y.detach().cpu().double() - z).norm() / z.norm())
        assert error <= (3e-3 if y.dtype == torch.bfloat16 else 2e-6), f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1000, 130), (4, 300, 8192)], ids=str)
def test_the_same_bits_twice(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, cotangents, ids = make(shape, dtype, dtype)
    first = results(x, cotangents, ids)
    for _ in range(5):
        assert all(torch.equal(y, z) for y, z in zip(results(x, cotangents, ids), first, strict=True))


def test_it_runs_on_the_stream_of_the_caller() -> None:
    x, cotangents, ids = make((1, 100_000, 64), torch.float32, torch.float32)
    expected = results(x, cotangents, ids)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        b = torch.zeros_like(x[1])
        # Work that is late on this stream alone: a kernel on another one would read zeros.
        for _ in range(50):
            b.copy_(x[1].detach() * 1.0)
        outputs = affine_scan(x[0], b.requires_grad_(), state=x[2], segment_ids=ids, backend="cuda")
    stream.synchronize()
    assert torch.equal(outputs[0], expected[0])


def test_it_is_captured_in_a_graph() -> None:
    x, cotangents, ids = make((2, 1000, 130), torch.bfloat16, torch.bfloat16)
    expected = results(x, cotangents, ids)
    a, b, state = (z.detach() for z in x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h, after = affine_scan(a, b, state=state, segment_ids=ids, backend="cuda")
    h.zero_()
    graph.replay()
    assert torch.equal(h, expected[0]) and torch.equal(after, expected[1])


def test_auto_takes_the_kernel() -> None:
    x, cotangents, ids = make((2, 300, 64), torch.float32, torch.float32)
    actual = results(x, cotangents, ids, backend="auto")
    assert all(torch.equal(y, z) for y, z in zip(actual, results(x, cotangents, ids), strict=True))
