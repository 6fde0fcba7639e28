"""The CUDA kernels of the memory op on a device, against the float64 token loop."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import miras_scan, scan_native
from tests.ops.fla_oracle import momentum_loop, needs_fla_core
from tests.ops.scan_cases import NAMES, assert_close, make, segments, truth

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16)
ALL = ("y", "M", "S", *NAMES)
# tokens, key dim, value dim, where segments start
SHAPES = [
    (1, 32, 32, ()),
    (63, 64, 16, (1, 62)),
    (65, 128, 128, (7, 64)),
    (1000, 32, 96, (15, 16, 63, 65, 128, 700)),
    (1000, 64, 64, ()),
    (1000, 128, 128, ()),
    (1000, 128, 384, (300, 512)),
]


def inputs(
    dtype: torch.dtype, tokens: int, key_dim: int, value_dim: int, *, repeated: bool = False, heads: int = 2
) -> list[Tensor]:
    """q, k, v, the gates, M and S on the device, as leaves; gates in the stable region."""
    x = [z.detach() for z in make(1, tokens, heads, key_dim, value_dim, gates="model", dtype=torch.float32)]
    if repeated:
        rng = torch.Generator().manual_seed(2)
        pool = F.normalize(torch.randn(4, key_dim, generator=rng), dim=-1)
        x[1] = pool[torch.randint(4, (1, tokens, heads), generator=rng)]
    return [z.to("cuda", dtype if i < 3 else torch.float32).requires_grad_() for i, z in enumerate(x)]


def results(x: list[Tensor], ids: Tensor | None = None, backend: str = "cuda") -> list[Tensor]:
    """y, M, S and all gradients, under one random cotangent."""
    y, state = miras_scan(*x[:6], state=(x[6], x[7]), segment_ids=ids, backend=backend)
    return [y, *state, *torch.autograd.grad([y, *state], x, cotangents(x))]


def cotangents(x: list[Tensor]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(z.shape, generator=rng).to(z) for z in (x[2], x[6], x[7])]


def check(x: list[Tensor], ids: Tensor | None, tolerance: float) -> None:
    host = [z.detach().cpu().double().requires_grad_() for z in x]
    expected = truth(host, None if ids is None else ids.cpu())
    grads = torch.autograd.grad(expected, host, [z.cpu().double() for z in cotangents(x)])
    assert_close([z.cpu() for z in results(x, ids)], [*expected, *grads], ALL, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "key_dim", "value_dim", "starts"), SHAPES)
def test_values_and_gradients_equal_the_token_loop(
    tokens: int, key_dim: int, value_dim: int, starts: tuple[int, ...], dtype: torch.dtype
) -> None:
    ids = segments(1, tokens, starts).cuda() if starts else None
    check(inputs(dtype, tokens, key_dim, value_dim), ids, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.small
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(32, 96), (64, 48), (128, 80)])
def test_every_kernel_on_a_few_tokens(key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    """Both passes in every dtype and key dim, over a ragged end, within segments and without, of one row and of two."""
    x = inputs(dtype, 150, key_dim, value_dim)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    check(x, None, tolerance)
    check(x, segments(1, 150, (1, 64, 100)).cuda(), tolerance)


@pytest.mark.parametrize("key_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_keys(key_dim: int, dtype: torch.dtype) -> None:
    check(inputs(dtype, 1000, key_dim, 64, repeated=True), None, 1e-5 if dtype == torch.float32 else 3e-2)


@needs_fla_core
@pytest.mark.parametrize("repeated", [False, True], ids=["random", "repeated"])
@pytest.mark.parametrize("key_dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_a_token_loop_that_this_project_did_not_write(key_dim: int, repeated: bool, dtype: torch.dtype) -> None:
    """That of fla-core, with a carried state."""
    x = inputs(dtype, 600, key_dim, 64, repeated=repeated, heads=4)
    wide = [z.detach().double().requires_grad_() for z in x]
    expected = momentum_loop(wide)
    expected += torch.autograd.grad(expected, wide, [z.double() for z in cotangents(x)])
    bfloat16 = 3e-2 if repeated else 1e-2
    assert_close(results(x), expected, ALL, 1e-5 if dtype == torch.float32 else bfloat16)


@pytest.mark.parametrize("key_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_twice(key_dim: int, dtype: torch.dtype) -> None:
    x = inputs(dtype, 3000, key_dim, key_dim, heads=8)
    first = results(x)
    for _ in range(5):
        for name, a, b in zip(ALL, results(x), first, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.full_size
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_sequence_in_spans_equals_the_torch_path(dtype: torch.dtype) -> None:
    """Long and wide enough that the buffers between the kernels are filled more than once."""
    x = inputs(dtype, 20_000, 128, 128, heads=24)
    ids = segments(1, 20_000, (5000, 12_345)).cuda()
    # The torch path in float32 on the same numbers.
    reference = [z.detach().float().requires_grad_() for z in x]
    expected = results(reference, ids, backend="torch")
    assert_close(results(x, ids), expected, ALL, 2e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    assert scan_native.fits("cuda:0", dtype, 32)
    x = inputs(dtype, 130, 32, 32)
    resets = torch.zeros(1, 130, dtype=torch.bool, device="cuda")
    resets[:, 70] = True
    for given in (None, resets):
        torch.library.opcheck(torch.ops.mnemos.miras_scan.default, (*x, given, 64, True))
        plain = [z.detach() for z in x]
        _, _, _, residuals, states = torch.ops.mnemos.miras_scan(*plain, given, 64, True)
        arguments = (*cotangents(plain), *plain[:6], given, residuals, states, 64)
        torch.library.opcheck(torch.ops.mnemos.miras_scan_backward.default, arguments)


def test_misaligned_inputs() -> None:
    """A contiguous view that starts in the middle of its storage: copies of 16 bytes cannot read it as it lies."""
    x = inputs(torch.bfloat16, 100, 64, 64)
    shifted = list(x)
    for i in range(3):
        storage = torch.empty(x[i].numel() + 1, dtype=x[i].dtype, device="cuda")
        view = storage[1:].view_as(x[i])
        view.copy_(x[i].detach())
        shifted[i] = view.requires_grad_()
    for name, a, b in zip(ALL, results(shifted), results(x), strict=True):
        assert torch.equal(a, b), name


def test_wrong_arguments_are_named() -> None:
    assert scan_native.fits("cuda:0", torch.float32, 32)
    x = [z.detach() for z in inputs(torch.float32, 100, 32, 32)]

    def call(index: int, value: Tensor, interval: int = 64) -> None:
        torch.ops.mnemos.miras_scan(*x[:index], value, *x[index + 1 :], None, interval, False)

    with pytest.raises(RuntimeError, match=r"v has shape \[1, 100, 1, 32\]; expected \[1, 100, 2, 32\]"):
        call(2, x[2][:, :, :1].contiguous())
    with pytest.raises(RuntimeError, match="k is not contiguous"):
        call(1, x[1].repeat_interleave(2, dim=-1)[..., ::2])
    with pytest.raises(RuntimeError, match="the interval is 32; expected a multiple of 64"):
        call(0, x[0], interval=32)
    with pytest.raises(RuntimeError, match="theta is not float32"):
        call(5, x[5].bfloat16())


@pytest.mark.full_size
def test_full_size_is_finite_and_its_time_is_recorded(record_property: Callable[[str, object], None]) -> None:
    """64K tokens, 16 heads of 128, bfloat16. The milliseconds are figures of the report, never asserted."""
    tokens, heads, dim = 65_536, 16, 128
    rng = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, dim, generator=rng, device="cuda") for _ in range(3))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    q, k, v = (z.bfloat16().requires_grad_() for z in (q, k, v))
    alpha, theta = (torch.rand(1, tokens, heads, generator=rng, device="cuda") * s for s in (1e-3, 0.2))
    eta = torch.full_like(alpha, 0.5)
    leaves = [q, k, v, *(z.requires_grad_() for z in (alpha, eta, theta))]
    cotangent = torch.randn_like(v)

    def both_passes() -> list[Tensor]:
        y, _ = miras_scan(*leaves, backend="cuda")
        return [y, *torch.autograd.grad(y, leaves, cotangent)]

    for name, z in zip(("y", *NAMES[:6]), both_passes(), strict=True):
        assert torch.isfinite(z).all(), name
    milliseconds = statistics.median(elapsed(both_passes) for _ in range(20))
    record_property("forward + backward, ms", f"{milliseconds:.2f}")
    record_property("us per token", f"{1e3 * milliseconds / tokens:.3f}")


def elapsed(work: Callable[[], object]) -> float:
    """Milliseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
