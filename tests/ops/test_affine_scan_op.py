"""The affine scan as an operation of PyTorch: autograd, compilation, autocast, what it keeps, and its own check."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.ops import affine_scan_native, native
from pipeline.ops.affine_scan import affine_scan
from tests.ops.affine_scan_cases import (
    BACKENDS,
    DTYPES,
    NAMES,
    assert_close,
    assert_same,
    cotangents,
    make,
    results,
    segments,
)
from tests.ops.affine_scan_reference import affine_loop
from tests.ops.saved import saved_by
from tests.ops.scan_cases import swapped


@pytest.mark.parametrize("change", [None, 0.3])
def test_gradcheck(change: float | None) -> None:
    x = make(2, 11, 3)
    ids = segments(2, 11, change)
    assert torch.autograd.gradcheck(lambda a, b, s: affine_scan(a, b, state=s, segment_ids=ids), x)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_the_op_keeps_what_pytorch_asks_of_one(learns: bool, resets: bool) -> None:
    assert affine_scan_native.why_not("cpu", torch.float32, torch.float32) is None
    a, b, state = (x.detach().requires_grad_(learns) for x in make(2, 50, 7, a=torch.float32))
    cuts = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) > 0.9 if resets else None
    checked = torch.library.opcheck(torch.ops.mnemos.affine_scan.default, (a, b, state, cuts, 16, learns))
    assert set(checked.values()) == {"SUCCESS"}
    if learns:
        _, after, states = torch.ops.mnemos.affine_scan(a, b, state, cuts, 16, True)
        assert not states.requires_grad
        inputs = [x.detach() for x in (b, after, a, b)]
        backward = torch.ops.mnemos.affine_scan_backward.default
        assert set(torch.library.opcheck(backward, (*inputs, cuts, states, 16)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_it_compiles_to_one_graph(backend: str) -> None:
    def layer(a: Tensor, b: Tensor, state: Tensor, ids: Tensor) -> Tensor:
        h, after = affine_scan(a.sigmoid(), b, state=state, segment_ids=ids, backend=backend)
        return h.sin().sum() + after.sum()

    ids = segments(2, 30, 0.1)
    x = make(2, 30, 7, a=torch.float32)
    expected = layer(*x, ids)
    actual = torch.compile(layer, fullgraph=True, backend="aot_eager")(*x, ids)
    assert torch.allclose(actual, expected, rtol=1e-6)
    for y, z in zip(*(torch.autograd.grad(w, x) for w in (actual, expected)), strict=True):
        assert torch.allclose(y, z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_differentiable_once_and_says_so(backend: str) -> None:
    x = make(1, 20, 3, a=torch.float32)
    h, _ = affine_scan(*x[:2], state=x[2], backend=backend)
    (gradient,) = torch.autograd.grad((h * h).sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once|once_differentiable"):
        gradient.sum().backward()


def test_an_op_that_saved_nothing_says_so() -> None:
    assert affine_scan_native.why_not("cpu", torch.float32, torch.float32) is None
    h, _, _ = torch.ops.mnemos.affine_scan(*make(1, 20, 3, a=torch.float32), None, 16, False)
    with pytest.raises(RuntimeError, match="save=False"):
        h.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_part_of_the_gradients(backend: str) -> None:
    """Outputs that nothing uses, inputs that need no gradient, and an expanded cotangent."""
    a, b, state = make(2, 30, 5, a=torch.float32)
    whole = results([a, b, state], backend=backend)
    h, after = affine_scan(a.detach(), b, state=state.detach(), backend=backend)
    (gradient,) = torch.autograd.grad((h, after), b, cotangents([a, b, state]))
    assert_same([gradient], [whole[3]])
    for output in (0, 1):
        outputs = affine_scan(a, b, state=state, backend=backend)
        actual = torch.autograd.grad(outputs[output].sum(), (a, b, state))
        leaves = [z.detach().double().requires_grad_() for z in (a, b, state)]
        loop = affine_loop(*leaves[:2], state=leaves[2])
        assert_close(actual, torch.autograd.grad(loop[output].sum(), leaves), NAMES[2:])
    with torch.no_grad():
        assert not affine_scan(a, b, backend=backend)[0].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_lower_the_precision(backend: str) -> None:
    x = make(1, 100, 5, a=torch.float32)
    expected = results(x, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = results(x, backend=backend)
    assert_same(actual, expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 40, 5), (3, 40, 4, 6)], ids=str)
def test_strided_inputs_give_the_same_bits(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, ids = make(*shape, a=dtype), segments(3, 40, 0.1)
    assert ids is not None
    expected = results(x, backend=backend, segment_ids=ids)
    strided, strided_ids = [swapped(z.detach()).requires_grad_() for z in x], swapped(ids)
    assert not any(z.is_contiguous() for z in (*strided, strided_ids))
    # All of them, and each alone.
    for chosen in (range(3), *([index] for index in range(3))):
        mixed = [strided[i] if i in chosen else x[i] for i in range(3)]
        assert_same(results(mixed, backend=backend, segment_ids=strided_ids), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_gradients_of_the_results_give_the_same_bits(backend: str) -> None:
    x = make(3, 40, 5, a=torch.float32)
    outputs, given = affine_scan(x[0], x[1], state=x[2], backend=backend), cotangents(x)
    expected = torch.autograd.grad(outputs, x, given, retain_graph=True)
    assert_same(torch.autograd.grad(outputs, x, [swapped(z) for z in given]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_left_as_they_are(backend: str) -> None:
    x = make(2, 300, 5, a=torch.float32)
    before = [z.detach().clone() for z in x]
    results(x, backend=backend)
    assert_same([z.detach() for z in x], before)
    h, after = affine_scan(*x[:2], state=x[2], backend=backend)
    assert after.untyped_storage().nbytes() == after.nbytes, "a saved state would drag a larger tensor along"
    assert h.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept_for_the_backward_pass(dtype: torch.dtype) -> None:
    """The inputs, and a float32 state for every 16 tokens."""
    x = make(2, 1600, 70, a=dtype)
    (h, _), kept = saved_by(lambda: affine_scan(*x[:2], state=x[2], backend="cpu"))
    assert h.requires_grad
    assert kept == x[0].nbytes + x[1].nbytes + 4 * 2 * 100 * 70


def test_a_kernel_that_fails_its_check_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(1, 40, 3, a=torch.float32)
    expected = results(x, backend="torch")
    monkeypatch.setattr(native, "_checked", {})
    monkeypatch.setattr(affine_scan_native, "_largest_error", lambda *_: math.nan)
    native.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="affine_scan is not used on cpu"):
        actual = results(x)
    assert_same(actual, expected)
    with pytest.raises(ValueError, match="backend 'cpu' cannot run: its results differ"):
        affine_scan(*x[:2], backend="cpu")


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_the_check_at_first_use_tells_right_from_wrong(
    dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert affine_scan_native._largest_error("cpu", *dtypes) <= 1e-3
    real = affine_scan_native.affine_scan_native

    def wrong(a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
        return real(a, b, state, None)

    monkeypatch.setattr(affine_scan_native, "affine_scan_native", wrong)
    assert not affine_scan_native._largest_error("cpu", *dtypes) <= 1e-2
