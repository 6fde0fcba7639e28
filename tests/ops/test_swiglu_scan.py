"""The large-chunk SwiGLU memory equals a float64 loop whose gradients are autograd's."""

import pytest
import torch

from pipeline.ops import swiglu_scan as module
from pipeline.ops.swiglu_scan import swiglu_scan
from tests.ops.deep_memories import SWIGLU
from tests.ops.scan_cases import TIGHT, error
from tests.ops.test_dual_scan import segments


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("muon", [False, True])
def test_values_and_gradients_equal_the_loop(muon: bool, segmented: bool, momentum: bool) -> None:
    ids = segments(2, 29) if segmented else None
    # Muon stretches small singular values, and rounding with them.
    tolerance = 1e-8 if muon else TIGHT
    SWIGLU.assert_same_op(SWIGLU.make(), tolerance, chunk=8, segment_ids=ids, momentum=momentum, muon=muon)


@pytest.mark.parametrize("sequence, chunk", [(1, 16), (5, 1), (16, 16), (17, 16), (20, 64), (23, 7)])
def test_any_length_and_chunk(sequence: int, chunk: int) -> None:
    x = SWIGLU.make(sequence=sequence, seed=sequence)
    SWIGLU.assert_same_op(x, chunk=chunk, segment_ids=segments(2, sequence, rate=0.2))


def test_a_chunk_is_read_before_it_is_written() -> None:
    x = SWIGLU.make(seed=1)
    y = SWIGLU.run(x, chunk=8)[0]
    for part in (slice(0, 8), slice(8, 16)):
        own = torch.autograd.grad(y[:, part].sum(), x[1], retain_graph=True)[0]
        assert not own[:, part].any()
        assert part.start == 0 or own[:, : part.start].any()


@pytest.mark.parametrize("muon", [False, True])
def test_norms_stay_those_of_the_initial_weights(muon: bool) -> None:
    x = SWIGLU.make(sequence=100)
    y, (offset, _) = swiglu_scan(*x[:5], 50 * x[5], tuple(x[6:9]), chunk=8, muon=muon)
    for start, part, dim in zip(x[6:9], offset.chunk(3, dim=-2), (-1, -1, -2), strict=True):
        now = start + part
        assert error(now, start.expand_as(now)) > 0.1
        torch.testing.assert_close(now.norm(dim=dim), start.norm(dim=dim).expand(2, -1, -1))
    assert y.isfinite().all()


@pytest.mark.parametrize("muon", [False, True])
def test_recomputation_changes_no_bit_and_keeps_little(muon: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = SWIGLU.make(1, 256, 4, 16, hidden=32, seed=9, dtype=torch.float32)
    kept = module.kept_bytes(4, 256, 16, 32, chunk=64, muon=muon)
    SWIGLU.assert_recomputation_keeps_little(x, kept, monkeypatch, chunk=64, muon=muon)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 13])
def test_products_by_halves(length: int) -> None:
    x = torch.rand(3, length, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        x[1, length // 2] = 0
    actual, expected = module._product(x), x.prod(dim=1)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(z.sum(), x)[0] for z in (actual, expected)))
