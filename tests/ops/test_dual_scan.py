"""The chunk-start scan equals a float64 token loop, value and gradient, for every error map and link."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops import chunks, miras_scan
from pipeline.ops import dual_scan as module
from pipeline.ops.dual_maps import HuberError, PNormError, QNormLink, SoftmaxLink, squared_error
from pipeline.ops.dual_scan import dual_scan
from tests.ops.family_reference import dual_loop
from tests.ops.saved import saved_by
from tests.ops.scan_cases import assert_close, error, gradients

NAMES = ("q", "k", "v", "alpha", "eta", "theta", "threshold", "A0", "S0")
OUTPUTS = ("y", "A", "S")
TIGHT = 1e-10


def make(
    batch: int = 2,
    sequence: int = 37,
    heads: int = 2,
    key_dim: int = 4,
    value_dim: int = 3,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """q, k, v, alpha, eta, theta, threshold, A, S as leaves; some gates are 0 and some alphas 1."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def uniform() -> Tensor:
        return torch.rand(batch, sequence, heads, generator=rng, dtype=torch.float64)

    q, k = (F.normalize(normal(batch, sequence, heads, key_dim), dim=-1) for _ in range(2))
    v = normal(batch, sequence, heads, value_dim)
    alpha, eta, theta = 0.1 * uniform(), 0.9 * uniform(), 0.3 * uniform()
    alpha = torch.where(uniform() < 0.05, 1.0, alpha)
    theta = torch.where(uniform() < 0.1, 0.0, theta)
    threshold = 0.1 + uniform()
    state = [normal(batch, heads, key_dim, value_dim) / 2 for _ in range(2)]
    return [x.to(dtype).clone().requires_grad_() for x in (q, k, v, alpha, eta, theta, threshold, *state)]


def segments(batch: int, sequence: int, seed: int = 3, rate: float = 0.12) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, sequence, generator=rng) < rate).long().cumsum(dim=1)


def run(x: Sequence[Tensor], *, momentum: bool = True, op: Callable = dual_scan, **options) -> list[Tensor]:
    eta = x[4] if momentum else None
    y, state = op(*x[:4], eta, x[5], threshold=x[6], state=(x[7], x[8]), **options)
    return [y, *state]


def q_norm(dual: Tensor, q: float, floor: float = 1e-6) -> Tensor:
    return (dual.abs().pow(q).sum() + floor**q).pow(1 / q)


# name: the package's map, and the same written out for one vector or one matrix.
ERRORS: dict[str, tuple[Callable, Callable]] = {
    "squared": (squared_error, lambda e, t: e),
    "p 3": (PNormError(3.0), lambda e, t: 3 * e.sign() * e.abs() ** 2),
    "p 2": (PNormError(2.0), lambda e, t: 2 * e),
    "p 3 sqrt": (PNormError(3.0, "sqrt", epsilon=0.1), lambda e, t: 3 * e * (e**2 + 0.1).sqrt()),
    "p 1.5 tanh": (
        PNormError(1.5, "tanh", epsilon=0.1, sharpness=4.0),
        lambda e, t: 1.5 * torch.tanh(4 * e) * (e**2 + 0.1) ** 0.25,
    ),
    "huber": (HuberError(), lambda e, t: torch.where(e.abs() <= t, e, t * e.sign())),
    "huber norm": (HuberError("norm"), lambda e, t: e if e.norm() <= t else t * e / e.norm()),
}
LINKS: dict[str, tuple[Callable | None, Callable]] = {
    "identity": (None, lambda dual: dual),
    "mirror": (
        QNormLink(4.0),
        lambda dual: q_norm(dual, 4) ** -2 * dual.abs() ** 3 * dual.sign(),
    ),
    "mirror 2.5": (
        QNormLink(2.5),
        lambda dual: q_norm(dual, 2.5) ** -0.5 * dual.abs() ** 1.5 * dual.sign(),
    ),
    "printed": (QNormLink(4.0, "printed", epsilon=0.1), lambda dual: dual / q_norm(dual, 4, 0.1) ** 2),
    "softmax": (SoftmaxLink(2.0), lambda dual: 2 * dual.exp() / dual.exp().sum(dim=1, keepdim=True)),
}


def assert_same_op(
    x: Sequence[Tensor], of: str = "squared", link: str = "identity", tolerance: float = TIGHT, **options
) -> None:
    (mine, truth), (own, plain) = ERRORS[of], LINKS[link]
    actual = run(x, error=mine, link=own, **options)
    expected = run(x, op=dual_loop, error=truth, link=plain, **options)
    assert_close(actual, expected, OUTPUTS, tolerance)
    assert_close(gradients(actual, x), gradients(expected, x), NAMES, tolerance)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("of", ERRORS)
def test_values_and_gradients_equal_the_token_loop(of: str, link: str) -> None:
    assert_same_op(make(), of, link, chunk=8, segment_ids=segments(2, 37))


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("link", ["identity", "mirror"])
def test_momentum_segments_and_clipping(link: str, clip: float | None, segmented: bool, momentum: bool) -> None:
    ids = segments(2, 37, seed=5) if segmented else None
    assert_same_op(make(seed=1), "p 3", link, chunk=8, segment_ids=ids, momentum=momentum, clip=clip)


@pytest.mark.parametrize("link", ["identity", "softmax"])
@pytest.mark.parametrize("sequence, chunk", [(1, 16), (5, 1), (16, 16), (17, 16), (30, 64), (23, 7), (33, 12)])
def test_any_length_and_chunk(sequence: int, chunk: int, link: str) -> None:
    x = make(sequence=sequence, seed=sequence)
    assert_same_op(x, "huber", link, chunk=chunk, segment_ids=segments(2, sequence))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2), sequence=st.integers(1, 30), heads=st.integers(1, 2), key_dim=st.integers(1, 5),
    value_dim=st.integers(1, 5), chunk=st.integers(1, 20), rate=st.sampled_from([0.0, 0.1, 0.6]),
    link=st.sampled_from(sorted(LINKS)), of=st.sampled_from(sorted(ERRORS)), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(batch, sequence, heads, key_dim, value_dim, chunk, rate, link, of, seed) -> None:
    x = make(batch, sequence, heads, key_dim, value_dim, seed=seed)
    options = {"chunk": chunk, "segment_ids": segments(batch, sequence, seed, rate)}
    (mine, truth), (own, plain) = ERRORS[of], LINKS[link]
    actual = run(x, error=mine, link=own, **options)
    expected = run(x, op=dual_loop, error=truth, link=plain, **options)
    pairs = zip([*actual, *gradients(actual, x)], [*expected, *gradients(expected, x)], strict=True)
    for name, (a, b) in zip((*OUTPUTS, *NAMES), pairs, strict=True):
        # Absolute too: a single value leaves softmax nothing to choose, and its gradients are rounding.
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)


def test_a_chunk_of_one_token_is_the_exact_rule() -> None:
    x = make(seed=2)
    ids = segments(2, 37)
    for momentum in (True, False):
        actual = run(x, chunk=1, momentum=momentum, segment_ids=ids)
        y, state = miras_scan(
            *x[:6], state=(x[7], x[8]), segment_ids=ids, rule="titans" if momentum else "delta", backend="torch"
        )
        assert_close(actual, [y, *state], OUTPUTS, TIGHT)


def test_the_chunk_is_part_of_the_result() -> None:
    x = make(seed=2)
    assert error(run(x, chunk=8)[0], run(x, chunk=16)[0]) > 1e-3


@pytest.mark.parametrize("link", ["identity", "mirror", "softmax"])
@pytest.mark.parametrize("cut", [8, 24, 32])
@pytest.mark.parametrize("momentum", [False, True])
def test_a_sequence_cut_at_a_chunk_equals_the_whole(cut: int, link: str, momentum: bool) -> None:
    x, ids = make(seed=4), torch.tensor([[0] * 5 + [1] * 22 + [2] * 10, [0] * 37])
    options = {"error": ERRORS["p 3"][0], "link": LINKS[link][0], "chunk": 8, "momentum": momentum}
    whole = run(x, segment_ids=ids, **options)
    state, pieces = (x[7], x[8]), []
    for part in (slice(0, cut), slice(cut, 37)):
        now = [*(z[:, part] for z in x[:7]), *state]
        y, *state = run(now, segment_ids=ids[:, part], **options)
        pieces.append(y)
    split = [torch.cat(pieces, dim=1), *state]
    assert_close(split, whole, OUTPUTS, TIGHT)
    assert_close(gradients(split, x), gradients(whole, x), NAMES, TIGHT)


@pytest.mark.parametrize("link", ["identity", "mirror", "softmax"])
def test_segments_that_begin_with_a_chunk_equal_separate_sequences(link: str) -> None:
    lengths = (16, 8, 13)
    x = make(batch=1, seed=5)
    options = {"error": ERRORS["huber"][0], "link": LINKS[link][0], "chunk": 8}
    packed = run(x, segment_ids=torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None], **options)
    zeros = [torch.zeros_like(x[7]), torch.zeros_like(x[8])]
    pieces = []
    for index, part in enumerate(zip(*(z.split(lengths, dim=1) for z in x[:7]), strict=True)):
        y, *state = run([*part, *(x[7:] if index == 0 else zeros)], **options)
        pieces.append(y)
    separate = [torch.cat(pieces, dim=1), *state]
    assert_close(packed, separate, OUTPUTS, TIGHT)
    assert_close(gradients(packed, x), gradients(separate, x), NAMES, TIGHT)


@pytest.mark.parametrize("link", LINKS)
def test_nothing_crosses_a_segment_border(link: str) -> None:
    x = make(seed=6)
    ids = torch.zeros(2, 37, dtype=torch.int64)
    ids[:, 20:] = 1  # inside a chunk
    y = run(x, error=ERRORS["p 3"][0], link=LINKS[link][0], chunk=8, segment_ids=ids, clip=1.0)[0]
    before = torch.autograd.grad(y[:, 20:].sum(), x, materialize_grads=True)
    for name, gradient in zip(NAMES[:7], before, strict=False):
        assert not gradient[:, :20].any(), name
    assert not before[7].any()
    assert not before[8].any()


@pytest.mark.parametrize("link", LINKS)
def test_the_past_does_not_see_the_future(link: str) -> None:
    x = make(seed=7)
    y = run(x, error=ERRORS["huber"][0], link=LINKS[link][0], chunk=16)[0]
    for gradient in torch.autograd.grad(y[:, :21].sum(), x[:7]):
        assert not gradient[:, 21:].any()


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("of", ERRORS)
def test_an_empty_memory_gives_finite_values_and_gradients(of: str, link: str) -> None:
    """Zero states, a value that is met exactly, and a token without key: nothing is 0 / 0."""
    x = [z.detach() for z in make(seed=8)]
    x[7], x[8] = torch.zeros_like(x[7]), torch.zeros_like(x[8])
    x[2][:, :5] = 0
    x[1][:, 3] = 0
    x = [z.float().requires_grad_() for z in x]
    outputs = run(x, error=ERRORS[of][0], link=LINKS[link][0], chunk=8, clip=1.0)
    assert all(z.isfinite().all() for z in [*outputs, *gradients(outputs, x)])


@pytest.mark.parametrize("link", ["identity", "mirror", "softmax"])
def test_blocks_and_recomputation_change_nothing(link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(sequence=50, seed=9)
    options = {"error": ERRORS["huber"][0], "link": LINKS[link][0], "chunk": 8, "segment_ids": segments(2, 50)}
    calls = []
    real = module._signal
    monkeypatch.setattr(module, "_signal", lambda *args: calls.append(1) or real(*args))

    def both() -> list[Tensor]:
        calls.clear()
        outputs = run(x, **options)
        return [*outputs, *gradients(outputs, x)]

    monkeypatch.setattr(chunks, "SPAN_CPU", 1)
    expected, before = both(), len(calls)
    monkeypatch.setattr(chunks, "KEEP", 0)
    actual, after = both(), len(calls)
    assert (before, after) == (7, 14)
    for name, a, b in zip((*OUTPUTS, *NAMES), actual, expected, strict=True):
        # Other spans add the same numbers up in another order.
        assert error(a, b) <= 1e-13, name
    monkeypatch.setattr(module, "_BLOCK_CPU", 1)
    for name, a, b in zip((*OUTPUTS, *NAMES), both(), expected, strict=True):
        assert error(a, b) <= 1e-12, name


@pytest.mark.parametrize("chunk, limit, expected", [(16, 2**20, 16), (64, 2**20, 16), (12, 5 * 64, 4), (7, 3 * 64, 1)])
def test_a_block_divides_its_chunk(chunk: int, limit: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_CPU", limit)
    assert module.block_tokens(1, 8, 8, chunk=chunk, device_type="cpu") == expected


@pytest.mark.parametrize("link", [None, QNormLink()])
def test_a_large_call_keeps_little(link: QNormLink | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is kept at spans' starts alone, and its memories nowhere."""

    def kept() -> int:
        x = make(1, 1024, 2, 16, 16, dtype=torch.float32)
        outputs, total = saved_by(lambda: run(x, link=link, chunk=16))
        assert outputs[0].requires_grad
        return total

    monkeypatch.setattr(chunks, "SPAN_CPU", 16 * 2 * 2 * 16 * 16)
    sizes = {"states": 2, "chunk": 16, "copies": link.copies if link else 0}
    whole = kept()
    assert whole == pytest.approx(module.kept_bytes(2, 1024, 16, 16, **sizes), rel=0.25)
    monkeypatch.setattr(chunks, "KEEP", 0)
    assert kept() < whole / (20 if link else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("link", ["identity", "mirror", "softmax"])
def test_low_precision_inputs(dtype: torch.dtype, link: str) -> None:
    """Sums are in float32: within 1e-5 of the float64 loop on the same inputs, y alone rounded to v's dtype."""
    x = [z.detach() for z in make(1, 64, 2, 8, 8, dtype=torch.float32)]
    x[:3] = [z.to(dtype) for z in x[:3]]
    x = [z.requires_grad_() for z in x]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(x, link=LINKS[link][0], chunk=8)
    expected = run(x, op=dual_loop, error=ERRORS["squared"][1], link=LINKS[link][1], chunk=8)
    assert [z.dtype for z in actual] == [dtype, torch.float32, torch.float32]
    assert_close(actual[1:], expected[1:], OUTPUTS[1:], 1e-5)
    assert error(actual[0], expected[0]) <= (4e-3 if dtype == torch.bfloat16 else 1e-5)


def test_the_state_is_its_own() -> None:
    for momentum in (True, False):
        _, dual, surprise = run(make(), momentum=momentum)
        for part in (dual, surprise):
            assert part.is_contiguous()
            assert part.untyped_storage().nbytes() == part.nbytes


def test_huber_memory_never_moves_apart_in_its_range() -> None:
    """Two memories under the same tokens, all of one key: step sizes that add up to .9 a chunk stretch no distance."""
    chunk, rng = 16, torch.Generator().manual_seed(0)
    key = F.normalize(torch.randn(8, generator=rng, dtype=torch.float64), dim=0)
    k = key.expand(1, 64 * chunk, 1, 8)
    v = torch.randn(1, 64 * chunk, 1, 8, generator=rng, dtype=torch.float64)
    gates = [torch.full((1, 64 * chunk, 1), value, dtype=torch.float64) for value in (0.01, 0.9 / chunk, 0.7)]
    for alpha in (gates[0], 0 * gates[0]):
        states = [torch.randn(1, 1, 8, 8, generator=rng, dtype=torch.float64) for _ in range(2)]
        distance = (states[0] - states[1]).norm()
        for start in range(0, 64 * chunk, chunk):
            part = slice(start, start + chunk)
            states = [
                dual_scan(
                    k[:, part], k[:, part], v[:, part], alpha[:, part], None, gates[1][:, part], error=HuberError(),
                    threshold=gates[2][:, part], state=(state, torch.zeros_like(state)), chunk=chunk,
                )[1][0]
                for state in states
            ]  # fmt: skip
            now = (states[0] - states[1]).norm()
            assert now <= distance * (1 + 1e-12)
            distance = now


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": lambda z: z[0]}, r"q has shape \[37, 2, 4\]; expected \[batch, sequence, heads, key dim\]"),
        ({"k": lambda z: z[..., :2]}, r"k has shape \[2, 37, 2, 2\]; expected \[2, 37, 2, 4\]"),
        ({"v": lambda z: z[:, :3]}, r"v has shape \[2, 3, 2, 3\]"),
        ({"v": lambda z: z.int()}, "v is int32; expected float64 or float32 or bfloat16 or float16"),
        ({"theta": lambda z: z.bfloat16()}, "theta is bfloat16; expected float64 or float32"),
        ({"eta": lambda z: z[..., :1]}, r"eta has shape \[2, 37, 1\]; expected \[2, 37, 2\]"),
        ({"threshold": lambda z: z[:1]}, r"threshold has shape \[1, 37, 2\]"),
        ({"A0": lambda z: z.mT}, r"state\[0\] \(M\) has shape \[2, 2, 3, 4\]; expected \[2, 2, 4, 3\]"),
        ({"S0": lambda z: z.float()}, r"state\[1\] \(S\) is float32; expected float64"),
        ({"k": lambda z: z.to("meta")}, "k is on meta; expected the device of q, cpu"),
    ],
)
def test_wrong_tensors_are_named(change: dict[str, Callable], message: str) -> None:
    x = [change.get(name, lambda z: z)(z.detach()) for name, z in zip(NAMES, make(), strict=True)]
    with pytest.raises(ValueError, match=message):
        run(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk is 0; expected a positive integer"),
        ({"clip": 0.0}, "clip is 0.0; expected a value above 0"),
        ({"segment_ids": torch.zeros(2, 4, dtype=torch.int64)}, r"segment_ids has shape \[2, 4\]"),
        ({"segment_ids": torch.zeros(2, 37)}, "segment_ids is float32; expected an integer type"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run([z.detach() for z in make()], **options)
