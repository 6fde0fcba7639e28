"""The memory op is exact: values and gradients are those of a float64 token loop, however the sequence is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ops import chunks, miras_scan
from tests.ops.reference import delta_loop
from tests.ops.scan_cases import (
    NAMES,
    TIGHT,
    assert_close,
    assert_same_op,
    error,
    gradients,
    make,
    run,
    segments,
    swapped,
    truth,
)


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
    monkeypatch.setattr(chunks, "SPAN_CPU", 2 * 4 * 8 * 16)
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
    strided = [swapped(z.detach()).requires_grad_() for z in x]
    assert_close(gradients(run(strided), strided), gradients(run(x), x), NAMES, TIGHT)
