"""The scan in pieces is the plain scan: values, final state and every gradient, wherever the cuts and borders are."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.ops import miras_scan, scan_split
from pipeline.ops.scan_split import miras_scan_split, pieces_for
from tests.ops.reference import token_loop
from tests.ops.saved import saved_by
from tests.ops.scan_cases import (
    BACKENDS,
    NAMES,
    OUTPUTS,
    TIGHT,
    assert_close,
    error,
    gradients,
    make,
    place,
    segments,
    swapped,
    truth,
)

CPU = torch.device("cpu")


def run(op, x: Sequence[Tensor], **options) -> list[Tensor]:
    y, state = op(*x[:6], state=(x[6], x[7]), **options)
    return [y, *state]


def assert_same_scan(x: Sequence[Tensor], pieces: int, tolerance: float = TIGHT, **options) -> None:
    actual, expected = run(miras_scan_split, x, pieces=pieces, **options), run(miras_scan, x, **options)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
    assert_close(actual, expected, OUTPUTS, tolerance)
    found = gradients(actual, x)
    assert_close(found, gradients(expected, x), NAMES, tolerance)
    for gradient, z in zip(found, x, strict=True):
        assert gradient.dtype == z.dtype


@pytest.mark.parametrize("gates", ["any", "model"])
@pytest.mark.parametrize("rule", ["titans", "delta"])
@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
@pytest.mark.parametrize("sequence", [1, 2, 5, 63, 64, 65, 100, 131])
def test_pieces_are_the_plain_scan(sequence: int, pieces: int, rule: str, gates: str) -> None:
    assert_same_scan(make(sequence=sequence, gates=gates, seed=sequence), pieces, rule=rule, chunk=16)


@pytest.mark.parametrize("gates", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 1.0, 0.1), (1.0, 0.0, 1.0)])
def test_gates_at_the_ends_of_their_range(gates: tuple[float, float, float]) -> None:
    x = make(sequence=40)
    with torch.no_grad():
        for gate, value in zip(x[3:6], gates, strict=True):
            gate.fill_(value)
    assert_same_scan(x, 4, chunk=16)


@pytest.mark.parametrize("rule", ["titans", "delta"])
@pytest.mark.parametrize(
    "starts",
    [(25,), (24,), (26,), (24, 25, 26), (25, 50, 75), (10,), (1, 99), (100,), (100, 101), tuple(range(1, 103))],
    ids=str,
)
def test_segments_that_start_at_a_cut_or_near_it(starts: tuple[int, ...], rule: str) -> None:
    """103 tokens in four pieces of 25, and three after them: cuts at 25, 50, 75 and 100."""
    assert_same_scan(make(sequence=103, gates="model"), 4, segment_ids=segments(2, 103, starts), chunk=16, rule=rule)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    sequence=st.integers(1, 60),
    pieces=st.integers(1, 70),
    rule=st.sampled_from(["titans", "delta"]),
    segmented=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(batch=2, sequence=3, pieces=70, rule="titans", segmented=True, seed=0)
def test_any_cut_is_the_plain_scan(
    batch: int, sequence: int, pieces: int, rule: str, segmented: bool, seed: int
) -> None:
    x = make(batch, sequence, 2, 5, 3, seed=seed, gates="model")
    generator = torch.Generator().manual_seed(seed)
    # A segment of its own length in every row.
    ids = (torch.rand(batch, sequence, generator=generator) < 0.1).int().cumsum(dim=1) if segmented else None
    assert_same_scan(x, pieces, segment_ids=ids, rule=rule, chunk=8)


@pytest.mark.parametrize("rule", ["titans", "delta"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_float32_against_the_float64_token_loop(backend: str, rule: str) -> None:
    exact = make(1, 520, 2, 32, 32, gates="model")
    x = [z.detach().float().requires_grad_() for z in exact]
    ids = segments(1, 520, (130, 300))
    same = [z.detach().double().requires_grad_() for z in x]
    if rule == "delta":
        expected = run(miras_scan, same, segment_ids=ids, rule=rule)
    else:
        expected = truth(same, ids)
    actual = run(miras_scan_split, x, pieces=4, segment_ids=ids, rule=rule, backend=backend)
    assert_close(actual, expected, OUTPUTS, 1e-5)
    assert_close(gradients(actual, x), gradients(expected, same), NAMES, 1e-5)


@pytest.mark.parametrize("repeated", [False, True])
def test_bfloat16_is_as_exact_as_the_plain_scan(repeated: bool) -> None:
    exact = make(1, 512, 2, 32, 32, gates="model")
    if repeated:
        with torch.no_grad():
            exact[1] = exact[1][:, :8].repeat(1, 64, 1, 1).requires_grad_()
    x = [z.detach().bfloat16() if i < 3 else z.detach().float() for i, z in enumerate(exact)]
    x = [z.requires_grad_() for z in x]
    same = [z.detach().double().requires_grad_() for z in x]
    expected = truth(same)
    expected_gradients = gradients(expected, same)
    actual = run(miras_scan_split, x, pieces=4)
    tolerance = 3e-2 if repeated else 1e-2
    assert_close(actual, expected, OUTPUTS, tolerance)
    assert_close(gradients(actual, x), expected_gradients, NAMES, tolerance)


def test_without_a_state_it_starts_empty() -> None:
    x = make(sequence=50)
    y, state = miras_scan_split(*x[:6], pieces=4)
    expected, expected_state = token_loop(*x[:6])
    assert_close([y, *state], [expected, *expected_state], OUTPUTS, TIGHT)


def test_delta_needs_no_momentum() -> None:
    x = make(sequence=50)
    y, state = miras_scan_split(*x[:4], None, x[5], pieces=4, rule="delta")
    expected, expected_state = miras_scan(*x[:4], None, x[5], rule="delta")
    assert_close([y, *state], [expected, *expected_state], OUTPUTS, TIGHT)


def test_gradients_where_only_some_inputs_need_them() -> None:
    x = [z.detach() for z in make(sequence=50)]
    x[2].requires_grad_()
    y, state = miras_scan_split(*x[:6], pieces=3)
    (found,) = torch.autograd.grad([y, *state], x[2], [y.detach(), *(z.detach() for z in state)])
    expected_y, expected_state = miras_scan(*x[:6])
    outputs = [expected_y, *expected_state]
    (expected,) = torch.autograd.grad(outputs, x[2], [z.detach() for z in outputs])
    assert error(found, expected) < TIGHT
    with torch.no_grad():
        assert not miras_scan_split(*x[:6], pieces=3)[0].requires_grad


def test_a_gradient_of_one_output_alone() -> None:
    x = make(sequence=50)
    for index in range(3):
        found, expected = (torch.autograd.grad(run(op, x, **options)[index].sum(), x, materialize_grads=True)
                           for op, options in ((miras_scan_split, {"pieces": 3}), (miras_scan, {})))  # fmt: skip
        assert_close(found, expected, NAMES, TIGHT)


@pytest.mark.parametrize("rule", ["titans", "delta"])
def test_gradcheck(rule: str) -> None:
    x = make(1, 7, 1, 2, 2)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    for segment_ids in (None, ids):
        assert torch.autograd.gradcheck(
            lambda *z, s=segment_ids: tuple(run(miras_scan_split, z, rule=rule, chunk=2, segment_ids=s, pieces=3)), x
        )


def test_the_same_bits_twice_and_under_recomputation() -> None:
    x = make(1, 300, 2, 16, 16, dtype=torch.float32, gates="model")

    def outputs(*z: Tensor) -> list[Tensor]:
        return run(miras_scan_split, z, pieces=4)

    results = []
    for again in (False, False, True):
        found = checkpoint(outputs, *x, use_reentrant=False) if again else outputs(*x)
        results.append([*found, *gradients(found, x)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_backward_twice_through_a_retained_graph() -> None:
    x = make(sequence=50)
    outputs = run(miras_scan_split, x, pieces=3)
    loss = sum(z.square().sum() for z in outputs)
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, x), strict=True))


def test_autocast_leaves_the_sums_wide() -> None:
    x = make(sequence=60, dtype=torch.float32, gates="model")
    expected = run(miras_scan_split, x, pieces=3)
    expected_gradients = gradients(expected, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(miras_scan_split, x, pieces=3)
        found = gradients(actual, x)
    assert all(torch.equal(a, b) for a, b in zip([*actual, *found], [*expected, *expected_gradients], strict=True))


def test_what_is_kept_is_the_inputs_and_one_more_row_a_token() -> None:
    x = make(2, 4096, 2, 16, 16, dtype=torch.float32)
    outputs, total = saved_by(lambda: run(miras_scan_split, x, pieces=4))
    assert outputs[0].requires_grad
    inputs = sum(z.nbytes for z in x[:6])
    reads, states = 2 * 4096 * 2 * 32 * 4, 4 * 4 * (32 * 16 + 32 * 32) * 4
    assert total == inputs + reads + states


def test_rows_that_fill_the_device_are_not_split() -> None:
    assert pieces_for(64, 65_536, device=CPU, units=64) == 1
    assert pieces_for(132, 65_536, device=CPU, units=132) == 1
    assert pieces_for(4, 1_000_000, device=CPU, units=4) == 1


def test_a_split_must_win_more_than_it_costs() -> None:
    assert pieces_for(1, 65_536, device=CPU, units=2) == 1
    assert pieces_for(2, 65_536, device=CPU, units=4) == 1
    assert pieces_for(1, 65_536, device=CPU, units=8) == 8
    assert pieces_for(4, 65_536, device=CPU, units=132) == 32


def test_short_sequences_are_not_split() -> None:
    assert pieces_for(1, 2 * scan_split.SHORTEST_PIECE - 1, device=CPU, units=1000) == 1
    assert pieces_for(1, 16 * scan_split.SHORTEST_PIECE, device=CPU, units=1000) == 16


@given(st.integers(1, 200), st.integers(1, 2**20), st.integers(1, 200))
def test_what_is_advised_is_never_slower_by_the_count(rows: int, sequence: int, units: int) -> None:
    pieces = pieces_for(rows, sequence, device=CPU, units=units)
    rounds = -(-rows * pieces // units) / pieces * (scan_split.COST if pieces > 1 else 1)
    assert rounds <= -(-rows // units)
    assert pieces == 1 or sequence // pieces >= scan_split.SHORTEST_PIECE


def test_auto_takes_what_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(scan_split, "pieces_for", lambda rows, sequence, device: seen.append((rows, sequence)) or 4)
    x = make(2, 50, 3, value_dim=20)
    assert_close(run(miras_scan_split, x), truth(x), OUTPUTS, TIGHT)
    assert seen == [(2 * 3 * 2, 50)], "batch x heads x slices of 16 columns"


@pytest.mark.parametrize("pieces", [0, -1, 2.0, True, "many"])
def test_a_wrong_number_of_pieces_is_named(pieces) -> None:
    x = make(sequence=5)
    with pytest.raises(ValueError, match=f"pieces is {pieces!r}; expected a positive integer or 'auto'"):
        miras_scan_split(*x[:6], pieces=pieces)


def test_errors_name_what_was_given() -> None:
    x = [z.detach() for z in make(sequence=6)]
    with pytest.raises(ValueError, match=r"v has shape \[2, 5, 2, 6\]; expected \[2, 6, 2, value dim\]"):
        miras_scan_split(x[0], x[1], x[2][:, :5], *x[3:6], pieces=2)
    with pytest.raises(ValueError, match="rule is 'hebb'"):
        miras_scan_split(*x[:6], pieces=2, rule="hebb")
    with pytest.raises(ValueError, match="backend is 'fast'"):
        miras_scan_split(*x[:6], pieces=2, backend="fast")
    with pytest.raises(ValueError, match=r"q has shape \[0, 6, 2, 8\]"):
        miras_scan_split(*(z[:0] for z in x[:6]))


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_strided_arguments_give_the_same_bits(backend: str, pieces: int) -> None:
    x = place(make(2, 70, 2, 32, 32, gates="model"), "cpu" if backend == "auto" else backend)
    strided = [swapped(z.detach()).requires_grad_() for z in x]
    results = []
    for inputs in (x, strided):
        outputs = run(miras_scan_split, inputs, pieces=pieces, backend=backend)
        results.append([*outputs, *gradients(outputs, inputs)])
    for actual, expected in zip(*reversed(results), strict=True):
        assert torch.equal(actual, expected)


def test_several_threads_at_once() -> None:
    """Nothing is kept between calls: every thread finds its own result."""
    found: dict[int, list[Tensor]] = {}

    def work(seed: int) -> None:
        x = make(1, 80, 2, seed=seed)
        outputs = run(miras_scan_split, x, pieces=4)
        found[seed] = [*outputs, *gradients(outputs, x)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        x = make(1, 80, 2, seed=seed)
        outputs = truth(x)
        assert_close(found[seed], [*outputs, *gradients(outputs, x)], (*OUTPUTS, *NAMES), TIGHT)
