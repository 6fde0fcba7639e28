"""The two-layer memory equals a float64 token loop whose gradients are autograd's."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import dual_chunks
from pipeline.ops import mlp_scan as module
from pipeline.ops.mlp_scan import mlp_scan
from tests.ops.family_reference import mlp_loop
from tests.ops.test_dual_scan import segments
from tests.ops.test_scan import assert_close, error, gradients

NAMES = ("q", "k", "v", "alpha", "eta", "theta", "W1", "W2", "D0", "S0")
OUTPUTS = ("y", "D", "S")
TIGHT = 1e-10
HIDDEN = 5


def make(
    batch: int = 2,
    sequence: int = 29,
    heads: int = 2,
    dim: int = 4,
    *,
    layers: int = 2,
    hidden: int = HIDDEN,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """q, k, v, three gates, the initial weights of each layer, and the state, as leaves."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def uniform() -> Tensor:
        return torch.rand(batch, sequence, heads, generator=rng, dtype=torch.float64)

    q, k = (F.normalize(normal(batch, sequence, heads, dim), dim=-1) for _ in range(2))
    v = normal(batch, sequence, heads, dim)
    alpha, eta, theta = 0.1 * uniform(), 0.9 * uniform(), 0.1 * uniform()
    initial = [normal(heads, hidden, dim) for _ in range(layers)]
    state = [0.3 * normal(batch, heads, layers * hidden, dim) for _ in range(2)]
    return [x.to(dtype).clone().requires_grad_() for x in (q, k, v, alpha, eta, theta, *initial, *state)]


def run(x: Sequence[Tensor], *, momentum: bool = True, op: Callable = mlp_scan, **options) -> list[Tensor]:
    y, state = op(*x[:4], x[4] if momentum else None, x[5], (x[6], x[7]), state=(x[8], x[9]), **options)
    return [y, *state]


def assert_same_op(x: Sequence[Tensor], tolerance: float = TIGHT, **options) -> None:
    actual, expected = run(x, **options), run(x, op=mlp_loop, **options)
    assert_close(actual, expected, OUTPUTS, tolerance)
    assert_close(gradients(actual, x), gradients(expected, x), NAMES, tolerance)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_values_and_gradients_equal_the_token_loop(clip: float | None, segmented: bool, momentum: bool) -> None:
    ids = segments(2, 29) if segmented else None
    assert_same_op(make(), chunk=8, segment_ids=ids, momentum=momentum, clip=clip)


@pytest.mark.parametrize("sequence, chunk", [(1, 16), (5, 1), (16, 16), (17, 16), (20, 64), (23, 7)])
def test_any_length_and_chunk(sequence: int, chunk: int) -> None:
    assert_same_op(make(sequence=sequence, seed=sequence), chunk=chunk, segment_ids=segments(2, sequence))


def test_no_state_is_the_initial_weights() -> None:
    x = make()
    y, state = mlp_scan(*x[:6], (x[6], x[7]), chunk=8)
    zeros = [*x[:8], torch.zeros_like(x[8]), torch.zeros_like(x[9])]
    assert_close([y, *state], run(zeros, chunk=8), OUTPUTS, TIGHT)
    still = [*zeros[:5], torch.zeros_like(x[5]), *zeros[6:]]
    read = F.gelu(torch.einsum("bthd,hfd->bthf", x[0], x[6]))
    assert_close(run(still)[:1], [torch.einsum("bthf,hfd->bthd", read, x[7])], OUTPUTS[:1], TIGHT)


def test_forgetting_pulls_towards_the_initial_weights() -> None:
    x = make(sequence=200)
    _, (offset, _) = mlp_scan(
        *x[:3], torch.full_like(x[3], 0.2), None, 0 * x[5], (x[6], x[7]), state=(x[8], x[9]), chunk=16
    )
    assert offset.norm() < 1e-15 * x[8].norm()


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("cut", [8, 24])
def test_a_sequence_cut_at_a_chunk_equals_the_whole(cut: int, momentum: bool) -> None:
    x, ids = make(seed=4), torch.tensor([[0] * 5 + [1] * 14 + [2] * 10, [0] * 29])
    whole = run(x, segment_ids=ids, chunk=8, momentum=momentum)
    state, pieces = (x[8], x[9]), []
    for part in (slice(0, cut), slice(cut, 29)):
        now = [*(z[:, part] for z in x[:6]), x[6], x[7], *state]
        y, *state = run(now, segment_ids=ids[:, part], chunk=8, momentum=momentum)
        pieces.append(y)
    split = [torch.cat(pieces, dim=1), *state]
    assert_close(split, whole, OUTPUTS, TIGHT)
    assert_close(gradients(split, x), gradients(whole, x), NAMES, TIGHT)


def test_segments_that_begin_with_a_chunk_equal_separate_sequences() -> None:
    lengths = (16, 8, 5)
    x = make(batch=1, seed=5)
    packed = run(x, chunk=8, segment_ids=torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None])
    zeros = [torch.zeros_like(x[8]), torch.zeros_like(x[9])]
    pieces = []
    for index, part in enumerate(zip(*(z.split(lengths, dim=1) for z in x[:6]), strict=True)):
        y, *state = run([*part, x[6], x[7], *(x[8:] if index == 0 else zeros)], chunk=8)
        pieces.append(y)
    separate = [torch.cat(pieces, dim=1), *state]
    assert_close(packed, separate, OUTPUTS, TIGHT)
    assert_close(gradients(packed, x), gradients(separate, x), NAMES, TIGHT)


def test_nothing_crosses_a_segment_border_or_goes_back_in_time() -> None:
    x = make(seed=6)
    ids = torch.zeros(2, 29, dtype=torch.int64)
    ids[:, 20:] = 1  # inside a chunk
    y = run(x, chunk=8, segment_ids=ids, clip=1.0)[0]
    after = torch.autograd.grad(y[:, 20:].sum(), x, materialize_grads=True, retain_graph=True)
    for name, gradient in zip(NAMES[:6], after, strict=False):
        assert not gradient[:, :20].any(), name
    assert not after[8].any()
    assert not after[9].any()
    for gradient in torch.autograd.grad(y[:, :13].sum(), x[:6]):
        assert not gradient[:, 13:].any()


def test_recomputation_changes_nothing_and_keeps_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.ops.scan_torch._SPAN_CPU", 8 * 4 * 2 * 2 * 16 * 32)
    x = make(1, 512, 4, 16, hidden=16, seed=9, dtype=torch.float32)
    with torch.no_grad():
        x[5].mul_(0.01)

    def both() -> tuple[list[Tensor], int]:
        storages: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = run(x, chunk=16)
        kept = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
        return [*outputs, *gradients(outputs, x)], kept

    expected, whole = both()
    assert whole == pytest.approx(module.kept_bytes(4, 512, 16, 16, states=2, chunk=16), rel=0.25)
    monkeypatch.setattr(dual_chunks, "KEEP", 0)
    actual, less = both()
    assert less < whole / 3
    for name, a, b in zip((*OUTPUTS, *NAMES), actual, expected, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs(dtype: torch.dtype) -> None:
    x = [z.detach() for z in make(1, 48, 2, 8, dtype=torch.float32)]
    x[:3] = [z.to(dtype) for z in x[:3]]
    x = [z.requires_grad_() for z in x]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(x, chunk=8)
    expected = run(x, op=mlp_loop, chunk=8)
    assert [z.dtype for z in actual] == [dtype, torch.float32, torch.float32]
    assert_close(actual[1:], expected[1:], OUTPUTS[1:], 1e-5)
    assert error(actual[0], expected[0]) <= (4e-3 if dtype == torch.bfloat16 else 1e-5)


def test_the_state_is_its_own() -> None:
    for momentum in (True, False):
        for part in run(make(), momentum=momentum)[1:]:
            assert part.is_contiguous()
            assert part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (2, lambda z: z[..., :3], r"v has shape \[2, 29, 2, 3\]; expected that of q"),
        (6, lambda z: z[:1], r"initial\[0\] \(W1\) has shape \[1, 5, 4\]; expected \[2, 5, 4\]"),
        (7, lambda z: z[:, :4], r"initial\[1\] \(W2\) has shape \[2, 4, 4\]; expected \[2, 5, 4\]"),
        (8, lambda z: z[:, :, :5], r"state\[0\] \(M\) has shape \[2, 2, 5, 4\]; expected \[2, 2, 10, 4\]"),
        (5, lambda z: z.bfloat16(), "theta is bfloat16"),
    ],
)
def test_wrong_tensors_are_named(index: int, change: Callable, message: str) -> None:
    x = [z.detach() for z in make()]
    x[index] = change(x[index])
    with pytest.raises(ValueError, match=message):
        run(x)


def test_a_clip_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clip is 0.0; expected a value above 0"):
        run(make(), clip=0.0)
