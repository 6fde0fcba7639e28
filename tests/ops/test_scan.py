"""The memory op is exact: values and gradients are those of a float64 token loop, however the sequence is cut."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.ops import miras_scan, native, scan_native, scan_torch
from tests.ops.reference import delta_loop, token_loop

TIGHT = 1e-10
NAMES = ("q", "k", "v", "alpha", "eta", "theta", "M0", "S0")
BACKENDS = ["torch", *filter(native.load, native.KINDS)]


def make(
    batch: int = 2,
    sequence: int = 65,
    heads: int = 2,
    key_dim: int = 8,
    value_dim: int = 6,
    *,
    seed: int = 0,
    gates: str = "any",
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """q, k, v, alpha, eta, theta, M, S as leaves. Gates: ``any`` in [0, 1], its ends included, or the ``model``'s."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def uniform() -> Tensor:
        return torch.rand(batch, sequence, heads, generator=rng, dtype=torch.float64)

    q, k = (F.normalize(normal(batch, sequence, heads, key_dim), dim=-1) for _ in range(2))
    v = normal(batch, sequence, heads, value_dim)
    if gates == "any":
        # One in eight is exactly 0, and one in eight exactly 1.
        ends = [(uniform() * 8).floor() for _ in range(3)]
        alpha, eta, theta = uniform() / 10, uniform(), uniform()
        alpha, eta, theta = (
            torch.where(end == 0, 0.0, torch.where(end == 1, 1.0, gate))
            for end, gate in zip(ends, (alpha, eta, theta), strict=True)
        )
    else:
        alpha, eta = uniform() * 0.01, uniform()[:, :1].expand(batch, sequence, heads) * 0.9
        theta = 0.9 * uniform() * (1 - eta) ** 2
    state = [normal(batch, heads, key_dim, value_dim) for _ in range(2)]
    return [x.to(dtype).clone().requires_grad_() for x in (q, k, v, alpha, eta, theta, *state)]


def run(x: Sequence[Tensor], **options) -> list[Tensor]:
    y, state = miras_scan(*x[:6], state=(x[6], x[7]), **options)
    return [y, *state]


def truth(x: Sequence[Tensor], segment_ids: Tensor | None = None) -> list[Tensor]:
    y, state = token_loop(*x[:6], state=(x[6], x[7]), segment_ids=segment_ids)
    return [y, *state]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients under one random cotangent for y and the final state."""
    rng = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(z.shape, generator=rng, dtype=torch.float64).to(z.dtype) for z in outputs]
    return list(torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True))


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str], tolerance: float) -> None:
    for name, a, b in zip(names, actual, expected, strict=True):
        assert a.shape == b.shape
        if not b.any():
            assert not a.any(), name
        else:
            assert error(a, b) <= tolerance, f"{name}: {error(a, b):.2e}"


def assert_same_op(x: Sequence[Tensor], tolerance: float = TIGHT, segment_ids: Tensor | None = None, **options) -> None:
    actual, expected = run(x, segment_ids=segment_ids, **options), truth(x, segment_ids)
    assert_close(actual, expected, ("y", "M", "S"), tolerance)
    assert_close(gradients(actual, x), gradients(expected, x), NAMES, tolerance)


@pytest.mark.parametrize("gates", ["any", "model"])
@pytest.mark.parametrize("chunk", [16, 32, 64, 128])
@pytest.mark.parametrize("sequence", [1, 15, 63, 64, 65, 100, 130])
def test_values_and_gradients_equal_the_token_loop(sequence: int, chunk: int, gates: str) -> None:
    """``any`` reaches every gate's ends but forgets within tens of tokens; in ``model`` all tokens reach the last."""
    assert_same_op(make(sequence=sequence, seed=sequence, gates=gates), chunk=chunk)


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("gates", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 1.0, 0.1), (1.0, 0.0, 1.0), (0.0, 0.0, 1.0)])
def test_gates_at_the_ends_of_their_range(gates: tuple[float, float, float], chunk: int) -> None:
    x = make(sequence=70)
    with torch.no_grad():
        for gate, value in zip(x[3:6], gates, strict=True):
            gate.fill_(value)
    assert_same_op(x, chunk=chunk)


def segments(batch: int, sequence: int, starts: Sequence[int]) -> Tensor:
    """Ids that come back (0, 1, 0, ...): a segment is a run of equal ids, not an id."""
    change = torch.zeros(batch, sequence, dtype=torch.int64)
    change[:, list(starts)] = 1
    return change.cumsum(dim=1) % 2


@pytest.mark.parametrize(
    "starts",
    [(7,), (16,), (15, 16, 17), (32, 64), (63, 64, 65), (1, 99), tuple(range(1, 100))],
    ids=["inside", "border", "around", "borders", "two borders", "ends", "every token"],
)
@pytest.mark.parametrize("chunk", [16, 64])
def test_segments_restart_the_state(starts: tuple[int, ...], chunk: int) -> None:
    assert_same_op(make(sequence=100, gates="model"), segment_ids=segments(2, 100, starts), chunk=chunk)


def test_segments_at_random_places() -> None:
    rng = torch.Generator().manual_seed(3)
    for chunk in (16, 64):
        ids = (torch.rand(2, 130, generator=rng) < 0.06).int().cumsum(dim=1)
        assert_same_op(make(sequence=130, seed=chunk), segment_ids=ids, chunk=chunk)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    sequence=st.integers(1, 70),
    heads=st.integers(1, 3),
    key_dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    chunk=st.integers(1, 40),
    change=st.sampled_from([None, 0.0, 0.05, 0.5]),
    seed=st.integers(0, 10_000),
)
def test_any_shape(
    batch: int, sequence: int, heads: int, key_dim: int, value_dim: int, chunk: int, change: float | None, seed: int
) -> None:
    ids = None
    if change is not None:
        rng = torch.Generator().manual_seed(seed)
        ids = (torch.rand(batch, sequence, generator=rng) < change).long().cumsum(dim=1)
    x = make(batch, sequence, heads, key_dim, value_dim, seed=seed)
    assert_same_op(x, segment_ids=ids, chunk=chunk)


def test_long_sequences_are_batched_in_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks of 8 tokens a span (a chunk has 4 heads of 8 x 16 elements); a segment starts at a border."""
    monkeypatch.setattr(scan_torch, "_SPAN_CPU", 2 * 4 * 8 * 16)
    x = make(2, 37, 2, gates="model")
    assert_same_op(x, chunk=8)
    assert_same_op(x, chunk=8, segment_ids=segments(2, 37, (16, 20)))
    expected = delta_loop(*x[:4], x[5], state=(x[6], x[7]))
    assert_close(run(x, rule="delta", chunk=8), [expected[0], *expected[1]], ("y", "M", "S"), TIGHT)


def test_no_state_is_a_state_of_zeros() -> None:
    x = make()
    y, state = miras_scan(*x[:6])
    zeros = [torch.zeros_like(x[6]), torch.zeros_like(x[7])]
    assert_close([y, *state], run([*x[:6], *zeros]), ("y", "M", "S"), TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs(dtype: torch.dtype) -> None:
    """float32 sums stay within 1e-5 of the float64 loop on the same inputs; y alone is rounded to v's dtype."""
    x = [z.detach() for z in make(1, 512, 2, 32, 32, gates="model", dtype=torch.float32)]
    x[:3] = [z.to(dtype) for z in x[:3]]
    x = [z.requires_grad_() for z in x]
    actual, expected = run(x), truth(x)
    assert [z.dtype for z in actual] == [dtype, torch.float32, torch.float32]
    assert_close(actual[1:], expected[1:], ("M", "S"), 1e-5)
    rounded = dtype == torch.bfloat16
    assert error(actual[0], expected[0]) <= (4e-3 if rounded else 1e-5)
    got = gradients(actual, x)
    assert [z.dtype for z in got] == [z.dtype for z in x]
    assert_close(got, gradients(expected, x), NAMES, 1e-2 if rounded else 1e-5)


def test_autocast_does_not_lower_the_precision() -> None:
    x = make(1, 100, 2, 16, 16, gates="model", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(x)
    for a, b in zip(inside, run(x), strict=True):
        assert torch.equal(a, b)


def test_the_result_does_not_depend_on_the_chunk_length() -> None:
    x = make(sequence=150, gates="model")
    expected = run(x, chunk=1)
    expected_gradients = gradients(expected, x)
    for chunk in (5, 16, 64, 150, 1000):
        actual = run(x, chunk=chunk)
        assert_close(actual, expected, ("y", "M", "S"), TIGHT)
        assert_close(gradients(actual, x), expected_gradients, NAMES, TIGHT)


@pytest.mark.parametrize("rule", ["titans", "delta"])
@pytest.mark.parametrize("cut", [1, 48, 64, 99])  # no cut is a segment's start: a new call cannot see that one
@pytest.mark.parametrize("segmented", [False, True])
def test_a_sequence_in_two_pieces_with_carried_state(cut: int, rule: str, segmented: bool) -> None:
    x = make(sequence=100, gates="model")
    ids = segments(2, 100, (30, 70)) if segmented else None
    state = (x[6], x[7])
    pieces = []
    for part in (slice(0, cut), slice(cut, 100)):
        part_ids = ids[:, part] if segmented else None
        y, state = miras_scan(*(z[:, part] for z in x[:6]), state=state, segment_ids=part_ids, rule=rule)
        pieces.append(y)
    split = [torch.cat(pieces, dim=1), *state]
    whole = run(x, segment_ids=ids, rule=rule)
    assert_close(split, whole, ("y", "M", "S"), TIGHT)
    assert_close(gradients(split, x), gradients(whole, x), NAMES, TIGHT)


def test_packed_segments_equal_separate_runs() -> None:
    x = make(batch=1, sequence=130, gates="model")
    lengths = (40, 24, 1, 65)
    ids = torch.repeat_interleave(torch.tensor([5, 2, 9, 5]), torch.tensor(lengths))[None]
    packed = run(x, segment_ids=ids)
    outputs, start, state = [], 0, (x[6], x[7])
    for length in lengths:
        y, state = miras_scan(*(z[:, start : start + length] for z in x[:6]), state=state)
        outputs.append(y)
        start, last, state = start + length, state, None
    separate = [torch.cat(outputs, dim=1), *last]
    assert_close(packed, separate, ("y", "M", "S"), TIGHT)
    assert_close(gradients(packed, x), gradients(separate, x), NAMES, TIGHT)


def test_nothing_crosses_a_segment_border() -> None:
    x = make(sequence=100)
    y, _ = miras_scan(*x[:6], state=(x[6], x[7]), segment_ids=segments(2, 100, (50,)))
    before = torch.autograd.grad(y[:, 50:].sum(), x)
    for name, gradient in zip(NAMES[:6], before, strict=False):
        assert not gradient[:, :50].any(), name
    assert not before[6].any()
    assert not before[7].any()
    assert not before[3][:, 50].any(), "the first token of a segment has nothing to forget"
    assert not before[4][:, 50].any(), "and no momentum"


def test_the_past_does_not_see_the_future() -> None:
    x = make(sequence=100)
    y, _ = miras_scan(*x[:6], chunk=32)
    for gradient in torch.autograd.grad(y[:, :41].sum(), x[:6]):
        assert not gradient[:, 41:].any()


@pytest.mark.parametrize("sequence", [1, 64, 100])
def test_delta_equals_its_own_loop(sequence: int) -> None:
    x = make(sequence=sequence)
    actual = run(x, rule="delta", chunk=32)
    y, state = delta_loop(*x[:4], x[5], state=(x[6], x[7]))
    expected = [y, *state]
    assert_close(actual, expected, ("y", "M", "S"), TIGHT)
    assert_close(gradients(actual, x), gradients(expected, x), NAMES, TIGHT)


def test_delta_is_titans_without_momentum() -> None:
    x = make(sequence=100)
    ids = segments(2, 100, (16, 30, 64, 99))
    still = [*x[:4], torch.zeros_like(x[4]), *x[5:]]
    actual, expected = run(x, rule="delta", segment_ids=ids), truth(still, ids)
    assert_close(actual, expected, ("y", "M", "S"), TIGHT)
    assert_close(gradients(actual, x), gradients(expected, x), NAMES, TIGHT)
    y, _ = miras_scan(*x[:4], None, x[5], state=(x[6], x[7]), segment_ids=ids, rule="delta")
    assert torch.equal(y, actual[0])


def test_the_same_bits_twice() -> None:
    x = make(1, 300, 2, 16, 16, dtype=torch.float32, gates="model")
    results = [(outputs := run(x)) + gradients(outputs, x) for _ in range(2)]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("rule", ["titans", "delta"])
def test_gradcheck(rule: str) -> None:
    x = make(1, 5, 1, 2, 2)
    ids = torch.tensor([[0, 0, 0, 1, 1]])
    for segment_ids in (None, ids):
        assert torch.autograd.gradcheck(lambda *z, s=segment_ids: tuple(run(z, rule=rule, chunk=2, segment_ids=s)), x)


def test_gradients_where_only_some_inputs_need_them() -> None:
    x = [z.detach() for z in make()]
    x[2].requires_grad_()
    y, state = miras_scan(*x[:6])
    (gradient,) = torch.autograd.grad(y.sum(), x[2])
    assert gradient.any()
    assert state[0].requires_grad
    with torch.no_grad():
        assert not run(x)[0].requires_grad


@pytest.mark.parametrize("rule", ["titans", "delta"])
@pytest.mark.parametrize("rows", [1, 2])
def test_arguments_are_left_as_they_are_and_the_state_is_its_own(rows: int, rule: str) -> None:
    x = make(rows, heads=rows)
    before = [z.detach().clone() for z in x]
    _, memory, momentum = run(x, rule=rule)
    assert all(torch.equal(a, b) for a, b in zip(before, x, strict=True))
    for part in (memory, momentum):
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.nbytes, "a saved state would drag a larger tensor along"


def test_strided_inputs() -> None:
    x = make(sequence=70)
    strided = [z.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for z in x]
    assert_close(gradients(run(strided), strided), gradients(run(x), x), NAMES, TIGHT)


def test_memory_for_the_backward_pass_grows_linearly() -> None:
    def saved(sequence: int) -> int:
        storages: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        x = make(1, sequence, 1, 4, 4, dtype=torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = run(x, chunk=16)
        total = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
        assert outputs[0].requires_grad
        return total

    short, long = saved(2048), saved(16_384)
    assert long <= 8.1 * short


RECOMPUTED = [
    pytest.param({}, id="plain"),
    pytest.param({"segment_ids": segments(2, 75, (16, 20, 48))}, id="segments"),
    pytest.param({"rule": "delta"}, id="delta"),
    pytest.param({"rule": "delta", "segment_ids": segments(2, 75, (5, 32))}, id="delta segments"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("options", RECOMPUTED)
def test_recomputed_spans_give_the_same_bits(
    options: dict, nested: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans of a few chunks; nested: as when the layer around the scan is recomputed as well."""
    monkeypatch.setattr(scan_torch, "_SPAN_CPU", 2 * 4 * 8 * 16)
    x = make(2, 75, 2, gates="model", dtype=dtype)
    calls = []
    real = scan_torch._span
    monkeypatch.setattr(scan_torch, "_span", lambda *args: calls.append(1) or real(*args))

    def layer(*z: Tensor) -> list[Tensor]:
        return [y.sin() for y in run([a * a for a in z], chunk=8, **options)]

    def both() -> list[Tensor]:
        calls.clear()
        if nested:
            # Something before and after the scan, so that the layer has more than it to recompute.
            outputs = checkpoint(layer, *x, use_reentrant=False)
        else:
            outputs = run(x, chunk=8, **options)
        return [*outputs, *gradients(outputs, x)]

    expected, before = both(), len(calls)
    monkeypatch.setattr(scan_torch, "_KEEP", 0)
    actual, after = both(), len(calls)
    for name, a, b in zip(("y", "M", "S", *NAMES), actual, expected, strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        run(x, chunk=8, **options)
    spans = len(calls) - after
    assert spans > 2
    assert (before, after) == ((2 * spans, 3 * spans) if nested else (spans, 2 * spans))


def test_recomputed_spans_keep_their_inputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"states": 2, "chunk": 64}
    monkeypatch.setattr(scan_torch, "_SPAN_CPU", 16 * 4 * 2 * 64 * 32)

    def kept() -> int:
        storages: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        x = make(2, 4096, 2, 32, 32, dtype=torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = run(x, backend="torch")
        assert outputs[0].requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    whole = kept()
    assert whole == pytest.approx(scan_torch.kept_bytes(4, 4096, 32, 32, **sizes), rel=0.05)
    monkeypatch.setattr(scan_torch, "_KEEP", 0)
    span = scan_torch.span_tokens(4, 32, 32, **sizes, device_type="cpu")
    assert 1 < 4096 / span <= 8
    # q, k, v, three gates, and the states at every span's start.
    assert kept() <= 1.05 * 4 * 4 * (4096 * (3 * 32 + 3) + 2 * 32 * 32 * (4096 // span + 1)) < whole / 8


def test_what_fits_a_laptop_is_kept() -> None:
    sizes = {"key_dim": 32, "value_dim": 32, "states": 2, "chunk": 64}
    assert not scan_torch.recomputes(4, 16_384, **sizes, span=64)
    assert scan_torch.recomputes(128, 65_536, **sizes, span=64)
    assert not scan_torch.recomputes(128, 65_536, **sizes, span=65_536)


def _replace(index: int, change) -> list:
    x = [z.detach() for z in make(sequence=5)]
    x[index] = change(x[index])
    return x


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda z: z[0], r"q has shape \[5, 2, 8\]; expected \[batch, sequence, heads, key dim\]"),
        (0, lambda z: z[:, :0], r"q has shape \[2, 0, 2, 8\]"),
        (0, lambda z: z[:0], r"q has shape \[0, 5, 2, 8\]; expected .* without a 0"),
        (0, lambda z: z.half(), "q is float16; expected float64 or float32 or bfloat16"),
        (1, lambda z: z[..., :4], r"k has shape \[2, 5, 2, 4\]; expected that of q, \[2, 5, 2, 8\]"),
        (2, lambda z: z[:, :4], r"v has shape \[2, 4, 2, 6\]; expected \[2, 5, 2, value dim\]"),
        (3, lambda z: z[..., None], r"alpha has shape \[2, 5, 2, 1\]; expected \[2, 5, 2\]"),
        (4, lambda z: z[..., :1], r"eta has shape \[2, 5, 1\]; expected \[2, 5, 2\]"),
        (4, lambda z: None, "eta is None; the rule 'titans' needs the momentum"),
        (5, lambda z: z.bfloat16(), "theta is bfloat16; expected float64 or float32"),
        (6, lambda z: z.mT, r"state\[0\] \(M\) has shape \[2, 2, 6, 8\]; expected \[2, 2, 8, 6\]"),
        (7, lambda z: z.float(), r"state\[1\] \(S\) is float32; expected float64"),
        (1, lambda z: z.to("meta"), "k is on meta; expected the device of q, cpu"),
    ],
)
def test_wrong_tensors_are_named(index: int, change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(_replace(index, change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "hebb"}, "rule is 'hebb'; expected 'titans' or 'delta'"),
        ({"backend": "cuda"}, r"q is float64 \[2, 5, 2, 8\] .* on cpu; backend 'cuda' expects a cuda tensor"),
        ({"backend": "cpu"}, "q is float64 .*; backend 'cpu' expects float32 or bfloat16"),
        ({"backend": "fast"}, "backend is 'fast'; expected"),
        ({"chunk": 0}, "chunk is 0; expected a positive integer"),
        ({"chunk": 16.0}, "chunk is 16.0; expected a positive integer"),
        ({"segment_ids": torch.zeros(2, 4, dtype=torch.int64)}, r"segment_ids has shape \[2, 4\]; expected \[2, 5\]"),
        ({"segment_ids": torch.zeros(2, 5)}, "segment_ids is float32; expected an integer type"),
        ({"state": (torch.zeros(1),)}, "state holds 1 tensors; expected two"),
        ({"state": 5}, r"state is of type int; expected a pair of tensors, \(M, S\)"),
        ({"state": (None, None)}, r"state\[0\] \(M\) is of type NoneType; expected a tensor of \[2, 2, 8, 6\]"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    x = [z.detach() for z in make(sequence=5)]
    with pytest.raises(ValueError, match=message):
        miras_scan(*x[:6], **options)


def place(x: Sequence[Tensor], backend: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Inputs on the backend's device as leaves: tokens in a dtype, gates and state in float32."""
    device = "cuda" if backend == "cuda" else "cpu"
    moved = [z.detach().to(device, dtype if i < 3 else torch.float32) for i, z in enumerate(x)]
    return [z.requires_grad_() for z in moved]


def assert_backend_is_the_loop(
    x: Sequence[Tensor], backend: str, tolerance: float, segment_ids: Tensor | None = None
) -> None:
    ids = None if segment_ids is None else segment_ids.to(x[0].device)
    actual, expected = run(x, segment_ids=ids, backend=backend), truth(x, ids)
    assert [z.dtype for z in actual] == [x[0].dtype, torch.float32, torch.float32]
    assert_close(actual, expected, ("y", "M", "S"), tolerance)
    # The same cotangents for both, as they are rounded.
    rng = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(z.shape, generator=rng).to(z) for z in actual]
    got = torch.autograd.grad(actual, x, cotangents)
    assert [(z.dtype, z.shape) for z in got] == [(z.dtype, z.shape) for z in x]
    wanted = torch.autograd.grad(expected, x, [z.double() for z in cotangents], materialize_grads=True)
    assert_close(got, wanted, NAMES, tolerance)


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


def test_auto_copies_what_is_not_contiguous_and_a_named_backend_refuses_it() -> None:
    x = place(make(sequence=70, key_dim=32, value_dim=32, gates="model"), "cpu")
    strided = [z.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for z in x]
    for a, b in zip(gradients(run(strided), strided), gradients(run(x), x), strict=True):
        assert torch.equal(a, b)
    for index, name in enumerate(("q", "k", "v", "alpha", "eta", "theta", r"state\[0\] \(M\)", r"state\[1\] \(S\)")):
        mixed = [*x[:index], strided[index], *x[index + 1 :]]
        with pytest.raises(ValueError, match=rf"^{name} is float32 \[2, .*strides .*'cpu' expects a contiguous tensor"):
            run(mixed, backend="cpu")


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda z: z.double(), r"q is float64 \[2, 5, 2, 32\] .*; backend 'cpu' expects float32 or bfloat16"),
        (2, lambda z: z.bfloat16(), "v is bfloat16 .*; backend 'cpu' expects the dtype of q, float32"),
        (3, lambda z: z.double(), r"alpha is float64 \[2, 5, 2\] .*; backend 'cpu' expects float32"),
        (4, lambda z: z.double(), "eta is float64 .*; backend 'cpu' expects float32"),
        (5, lambda z: z.double(), "theta is float64 .*; backend 'cpu' expects float32"),
    ],
)
def test_what_a_named_backend_does_not_take_is_named(index: int, change, message: str) -> None:
    x = [z.detach() for z in place(make(sequence=5, key_dim=32, value_dim=32), "cpu")]
    x[index] = change(x[index])
    state = None if index == 0 else (x[6], x[7])
    with pytest.raises(ValueError, match=message):
        miras_scan(*x[:6], state=state, backend="cpu")
    y, _ = miras_scan(*x[:6], state=state)
    assert y.dtype == x[2].dtype


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((48, 32), r"q is float32 \[2, 5, 2, 48\] .*; backend 'cpu' expects a key dim of 32, 64 or 128"),
        ((32, 24), r"v is float32 \[2, 5, 2, 24\] .*; backend 'cpu' expects a value dim that is a multiple of 16"),
        ((32, 0), r"v is float32 \[2, 5, 2, 0\] .*; backend 'cpu' expects no dimension of 0"),
    ],
)
def test_head_sizes_that_a_named_backend_does_not_take(sizes: tuple[int, int], message: str) -> None:
    x = place(make(2, 5, 2, *sizes), "cpu")
    with pytest.raises(ValueError, match=message):
        run(x, backend="cpu")


@pytest.mark.parametrize(
    ("name", "index", "value", "worst"),
    [
        ("alpha", 3, -0.5, "-0.5"),
        ("eta", 4, 1.5, "1.5"),
        ("theta", 5, torch.nan, "nan"),
        ("theta", 5, torch.inf, "inf"),
    ],
)
def test_gates_outside_their_range_are_named_in_debug_mode(
    monkeypatch: pytest.MonkeyPatch, name: str, index: int, value: float, worst: str
) -> None:
    x = [z.detach() for z in make(sequence=5)]
    run(x)
    x[index][0, 0, 0] = 1.25
    x[index][1, 3, 1] = value
    run(x)
    monkeypatch.setenv("MNEMOS_DEBUG", "1")
    with pytest.raises(ValueError, match=rf"{name} of shape \[2, 5, 2\] holds {worst}; expected values in \[0, 1\]"):
        run(x)
    if name == "eta":
        run(x, rule="delta")  # which ignores it
    x[index].clamp_(0, 1).nan_to_num_()
    run(x)
