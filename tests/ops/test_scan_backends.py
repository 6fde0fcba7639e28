"""Every backend of the memory op that is built here is held to the float64 token loop."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.ops import miras_scan, scan_native
from tests.ops.reference import delta_loop
from tests.ops.scan_cases import (
    BACKENDS,
    NAMES,
    assert_backend_is_the_loop,
    assert_close,
    gradients,
    make,
    place,
    run,
    segments,
    swapped,
)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("sequence", [1, 63, 65, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_equals_the_token_loop(backend: str, sequence: int, segmented: bool) -> None:
    x = place(make(2, sequence, 2, 32, 48, seed=sequence, gates="model"), backend)
    starts = [i for i in (31, 64, 130, 131, 900) if i < sequence]
    assert_backend_is_the_loop(x, backend, 1e-5, segments(2, sequence, starts) if segmented else None)


@pytest.mark.parametrize("value_dim", [16, 128])
@pytest.mark.parametrize("key_dim", scan_native.KEY_DIMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_at_every_head_size(backend: str, key_dim: int, value_dim: int) -> None:
    x = place(make(1, 130, 2, key_dim, value_dim, gates="model"), backend)
    assert_backend_is_the_loop(x, backend, 1e-5, segments(1, 130, (100,)))


@pytest.mark.parametrize("repeated", [False, True], ids=["random keys", "repeated keys"])
@pytest.mark.parametrize("key_dim", scan_native.KEY_DIMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_in_bfloat16(backend: str, key_dim: int, repeated: bool) -> None:
    """Errors of rounding the operands grow where a few keys come again and again."""
    x = make(1, 500, 2, key_dim, 32, gates="model")
    if repeated:
        x[1] = x[1][:, torch.arange(500) % 5]
    assert_backend_is_the_loop(place(x, backend, torch.bfloat16), backend, 3e-2 if repeated else 1e-2)


@pytest.mark.parametrize("gates", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_with_gates_at_the_ends(backend: str, gates: tuple[float, float, float]) -> None:
    x = place(make(sequence=70, key_dim=32, value_dim=32), backend)
    with torch.no_grad():
        for gate, value in zip(x[3:6], gates, strict=True):
            gate.fill_(value)
    assert_backend_is_the_loop(x, backend, 1e-5, segments(2, 70, (40,)))


@pytest.mark.parametrize("starts", [(32,), (31, 32, 33), (64,), (1, 69), tuple(range(1, 70))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_restarts_the_state(backend: str, starts: tuple[int, ...]) -> None:
    x = place(make(sequence=70, key_dim=32, value_dim=16, gates="model"), backend)
    ids = segments(2, 70, starts)
    assert_backend_is_the_loop(x, backend, 1e-5, ids)
    y = run(x, backend=backend, segment_ids=ids.to(x[0].device))[0]
    before = torch.autograd.grad(y[:, starts[-1] :].sum(), x)
    for name, gradient in zip(NAMES[:6], before, strict=False):
        assert not gradient[:, : starts[-1]].any(), name
    assert not before[6].any() and not before[7].any()


@pytest.mark.parametrize("rule", ["titans", "delta"])
@pytest.mark.parametrize("cut", [1, 64, 99])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_in_two_pieces_with_carried_state(backend: str, cut: int, rule: str) -> None:
    x = place(make(sequence=100, key_dim=32, value_dim=32, gates="model"), backend)
    state: tuple[Tensor, Tensor] = (x[6], x[7])
    pieces = []
    for part in (slice(0, cut), slice(cut, 100)):
        tokens = [z[:, part].contiguous() for z in x[:6]]
        y, state = miras_scan(*tokens, state=state, rule=rule, backend=backend)
        pieces.append(y)
    split, whole = [torch.cat(pieces, dim=1), *state], run(x, rule=rule, backend=backend)
    assert_close(split, whole, ("y", "M", "S"), 1e-5)
    assert_close(gradients(split, x), gradients(whole, x), NAMES, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_delta_on_every_backend_equals_its_own_loop(backend: str) -> None:
    x = place(make(sequence=100, key_dim=32, value_dim=32), backend)
    exact = [z.detach().double().requires_grad_() for z in x]
    y, state = delta_loop(*exact[:4], exact[5], state=(exact[6], exact[7]))
    with torch.no_grad():
        x[7].fill_(torch.inf)  # no part of the rule
    actual, expected = run(x, rule="delta", backend=backend), [y, *state]
    assert_close(actual, expected, ("y", "M", "S"), 1e-5)
    assert_close(gradients(actual, x), gradients(expected, exact), NAMES, 1e-5)
    without = miras_scan(*x[:4], None, x[5], state=(x[6], x[7]), rule="delta", backend=backend)
    assert torch.equal(without[0], actual[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_same_bits_twice(backend: str, dtype: torch.dtype) -> None:
    x = place(make(2, 300, 3, 64, 64, gates="model"), backend, dtype)
    results = [(outputs := run(x, backend=backend)) + gradients(outputs, x) for _ in range(2)]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("rule", ["titans", "delta"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_leaves_its_arguments_and_owns_its_state(backend: str, rule: str) -> None:
    x = place(make(key_dim=32, value_dim=32), backend)
    before = [z.detach().clone() for z in x]
    _, memory, momentum = run(x, rule=rule, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, x, strict=True))
    for part in (memory, momentum):
        assert part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
    empty = [torch.zeros_like(z) for z in x[6:]]
    for a, b in zip(run([*x[:6], *empty], rule=rule, backend=backend), _flat(x, rule, backend), strict=True):
        assert torch.equal(a, b)


def _flat(x: Sequence[Tensor], rule: str, backend: str) -> list[Tensor]:
    y, state = miras_scan(*x[:6], rule=rule, backend=backend)
    return [y, *state]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_lower_the_precision_of_any_backend(backend: str) -> None:
    x = place(make(1, 100, 2, 32, 32, gates="model"), backend)
    with torch.autocast(x[0].device.type, dtype=torch.bfloat16):
        inside = run(x, backend=backend)
    for a, b in zip(inside, run(x, backend=backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["titans", "delta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_strided_arguments_give_every_backend_the_same_bits(backend: str, dtype: torch.dtype, rule: str) -> None:
    x = place(
        make(sequence=70, key_dim=32, value_dim=32, gates="model"), "cpu" if backend == "auto" else backend, dtype
    )
    ids = segments(2, 70, (40,)).to(x[0].device)
    outputs = run(x, backend=backend, rule=rule, segment_ids=ids)
    expected = outputs + gradients(outputs, x)
    strided, strided_ids = [swapped(z.detach()).requires_grad_() for z in x], swapped(ids)
    assert not any(z.is_contiguous() for z in (*strided, strided_ids))
    # All of them, and each alone.
    for chosen in (range(8), *([index] for index in range(8))):
        mixed = [strided[i] if i in chosen else x[i] for i in range(8)]
        outputs = run(mixed, backend=backend, rule=rule, segment_ids=strided_ids)
        for actual, wanted in zip(outputs + gradients(outputs, mixed), expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_gradients_of_the_results_give_the_same_bits(backend: str) -> None:
    x = place(make(sequence=70, key_dim=32, value_dim=32, gates="model"), backend)
    outputs = run(x, backend=backend)
    given = [torch.randn_like(z) for z in outputs]
    expected = torch.autograd.grad(outputs, x, given, retain_graph=True)
    for actual, wanted in zip(torch.autograd.grad(outputs, x, [swapped(z) for z in given]), expected, strict=True):
        assert torch.equal(actual, wanted)
