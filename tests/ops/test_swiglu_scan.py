"""The large-chunk SwiGLU memory equals a float64 loop whose gradients are autograd's."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pipeline.ops import dual_chunks
from pipeline.ops import swiglu_scan as module
from pipeline.ops.swiglu_scan import swiglu_scan
from tests.ops.family_reference import swiglu_loop
from tests.ops.test_dual_scan import segments
from tests.ops.test_mlp_scan import HIDDEN, make
from tests.ops.test_scan import assert_close, error, gradients

NAMES = ("q", "k", "v", "alpha", "eta", "theta", "gate", "up", "down", "D0", "S0")
OUTPUTS = ("y", "D", "S")
TIGHT = 1e-10


def inputs(*args: int, **options) -> list[Tensor]:
    return make(*args, layers=3, **options)


def run(x: Sequence[Tensor], *, momentum: bool = True, op: Callable = swiglu_scan, **options) -> list[Tensor]:
    y, state = op(*x[:4], x[4] if momentum else None, x[5], tuple(x[6:9]), state=(x[9], x[10]), **options)
    return [y, *state]


def assert_same_op(x: Sequence[Tensor], tolerance: float = TIGHT, **options) -> None:
    actual, expected = run(x, **options), run(x, op=swiglu_loop, **options)
    assert_close(actual, expected, OUTPUTS, tolerance)
    assert_close(gradients(actual, x), gradients(expected, x), NAMES, tolerance)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("muon", [False, True])
def test_values_and_gradients_equal_the_loop(muon: bool, segmented: bool, momentum: bool) -> None:
    ids = segments(2, 29) if segmented else None
    # Muon stretches small singular values, and rounding with them.
    tolerance = 1e-8 if muon else TIGHT
    assert_same_op(inputs(), tolerance, chunk=8, segment_ids=ids, momentum=momentum, muon=muon)


@pytest.mark.parametrize("sequence, chunk", [(1, 16), (5, 1), (16, 16), (17, 16), (20, 64), (23, 7)])
def test_any_length_and_chunk(sequence: int, chunk: int) -> None:
    x = inputs(sequence=sequence, seed=sequence)
    assert_same_op(x, chunk=chunk, segment_ids=segments(2, sequence, rate=0.2))


def test_a_chunk_is_read_before_it_is_written() -> None:
    x = inputs(seed=1)
    y = run(x, chunk=8)[0]
    for part in (slice(0, 8), slice(8, 16)):
        own = torch.autograd.grad(y[:, part].sum(), x[1], retain_graph=True)[0]
        assert not own[:, part].any()
        assert part.start == 0 or own[:, : part.start].any()


@pytest.mark.parametrize("muon", [False, True])
def test_norms_stay_those_of_the_initial_weights(muon: bool) -> None:
    x = inputs(sequence=100)
    y, (offset, _) = swiglu_scan(*x[:5], 50 * x[5], tuple(x[6:9]), chunk=8, muon=muon)
    for start, part, dim in zip(x[6:9], offset.chunk(3, dim=-2), (-1, -1, -2), strict=True):
        now = start + part
        assert error(now, start.expand_as(now)) > 0.1
        torch.testing.assert_close(now.norm(dim=dim), start.norm(dim=dim).expand(2, -1, -1))
    assert y.isfinite().all()


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("cut", [8, 24])
def test_a_sequence_cut_at_a_chunk_equals_the_whole(cut: int, momentum: bool) -> None:
    x, ids = inputs(seed=4), torch.tensor([[0] * 5 + [1] * 14 + [2] * 10, [0] * 29])
    whole = run(x, segment_ids=ids, chunk=8, momentum=momentum)
    state, pieces = (x[9], x[10]), []
    for part in (slice(0, cut), slice(cut, 29)):
        now = [*(z[:, part] for z in x[:6]), *x[6:9], *state]
        y, *state = run(now, segment_ids=ids[:, part], chunk=8, momentum=momentum)
        pieces.append(y)
    split = [torch.cat(pieces, dim=1), *state]
    assert_close(split, whole, OUTPUTS, TIGHT)
    assert_close(gradients(split, x), gradients(whole, x), NAMES, TIGHT)


def test_segments_that_begin_with_a_chunk_equal_separate_sequences() -> None:
    lengths = (16, 8, 5)
    x = inputs(batch=1, seed=5)
    packed = run(x, chunk=8, segment_ids=torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None])
    zeros = [torch.zeros_like(x[9]), torch.zeros_like(x[10])]
    pieces = []
    for index, part in enumerate(zip(*(z.split(lengths, dim=1) for z in x[:6]), strict=True)):
        y, *state = run([*part, *x[6:9], *(x[9:] if index == 0 else zeros)], chunk=8)
        pieces.append(y)
    separate = [torch.cat(pieces, dim=1), *state]
    assert_close(packed, separate, OUTPUTS, TIGHT)
    assert_close(gradients(packed, x), gradients(separate, x), NAMES, TIGHT)


def test_nothing_crosses_a_segment_border_or_goes_back_in_time() -> None:
    x = inputs(seed=6)
    ids = torch.zeros(2, 29, dtype=torch.int64)
    ids[:, 12:] = 1  # inside a chunk
    y = run(x, chunk=8, segment_ids=ids, muon=True)[0]
    after = torch.autograd.grad(y[:, 12:].sum(), x, materialize_grads=True, retain_graph=True)
    for name, gradient in zip(NAMES[:6], after, strict=False):
        assert not gradient[:, :12].any(), name
    assert not after[9].any()
    assert not after[10].any()
    for gradient in torch.autograd.grad(y[:, :20].sum(), x[:6]):
        assert not gradient[:, 20:].any()


@pytest.mark.parametrize("muon", [False, True])
def test_recomputation_changes_no_bit_and_keeps_little(muon: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(1, 256, 4, 16, hidden=32, seed=9, dtype=torch.float32)

    def both() -> tuple[list[Tensor], int]:
        storages: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = run(x, chunk=64, muon=muon)
        kept = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
        return [*outputs, *gradients(outputs, x)], kept

    expected, whole = both()
    assert whole == pytest.approx(module.kept_bytes(4, 256, 16, 32, chunk=64, muon=muon), rel=0.25)
    monkeypatch.setattr(dual_chunks, "KEEP", 0)
    actual, less = both()
    assert less < whole / 3
    for name, a, b in zip((*OUTPUTS, *NAMES), actual, expected, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs(dtype: torch.dtype) -> None:
    x = [z.detach() for z in inputs(1, 48, 2, 8, dtype=torch.float32)]
    x[:3] = [z.to(dtype) for z in x[:3]]
    x = [z.requires_grad_() for z in x]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(x, chunk=8)
    expected = run(x, op=swiglu_loop, chunk=8)
    assert [z.dtype for z in actual] == [dtype, torch.float32, torch.float32]
    assert_close(actual[1:], expected[1:], OUTPUTS[1:], 1e-5)
    assert error(actual[0], expected[0]) <= (4e-3 if dtype == torch.bfloat16 else 1e-5)


def test_the_state_is_its_own() -> None:
    for part in run(inputs())[1:]:
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 13])
def test_products_by_halves(length: int) -> None:
    x = torch.rand(3, length, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        x[1, length // 2] = 0
    actual, expected = module._product(x), x.prod(dim=1)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(z.sum(), x)[0] for z in (actual, expected)))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (2, lambda z: z[..., :3], r"v has shape \[2, 29, 2, 3\]; expected that of q"),
        (7, lambda z: z[:1], rf"initial\[1\] \(up\) has shape \[1, {HIDDEN}, 4\]; expected \[2, {HIDDEN}, 4\]"),
        (9, lambda z: z[:, :, :5], r"state\[0\] \(M\) has shape \[2, 2, 5, 4\]; expected \[2, 2, 15, 4\]"),
        (4, lambda z: z[:, :5], r"eta has shape \[2, 5, 2\]"),
    ],
)
def test_wrong_tensors_are_named(index: int, change: Callable, message: str) -> None:
    x = [z.detach() for z in inputs()]
    x[index] = change(x[index])
    with pytest.raises(ValueError, match=message):
        run(x)
