"""The two-layer memory equals a float64 token loop whose gradients are autograd's."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.ops import chunks
from pipeline.ops.mlp_scan import kept_bytes, mlp_scan
from tests.ops.deep_memories import MLP, OUTPUTS
from tests.ops.scan_cases import TIGHT, assert_close
from tests.ops.test_dual_scan import segments


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_values_and_gradients_equal_the_token_loop(clip: float | None, segmented: bool, momentum: bool) -> None:
    ids = segments(2, 29) if segmented else None
    MLP.assert_same_op(MLP.make(), chunk=8, segment_ids=ids, momentum=momentum, clip=clip)


@pytest.mark.parametrize("sequence, chunk", [(1, 16), (5, 1), (16, 16), (17, 16), (20, 64), (23, 7)])
def test_any_length_and_chunk(sequence: int, chunk: int) -> None:
    MLP.assert_same_op(MLP.make(sequence=sequence, seed=sequence), chunk=chunk, segment_ids=segments(2, sequence))


def test_no_state_is_the_initial_weights() -> None:
    x = MLP.make()
    y, state = mlp_scan(*x[:6], (x[6], x[7]), chunk=8)
    zeros = [*x[:8], torch.zeros_like(x[8]), torch.zeros_like(x[9])]
    assert_close([y, *state], MLP.run(zeros, chunk=8), OUTPUTS, TIGHT)
    still = [*zeros[:5], torch.zeros_like(x[5]), *zeros[6:]]
    read = F.gelu(torch.einsum("bthd,hfd->bthf", x[0], x[6]))
    assert_close(MLP.run(still)[:1], [torch.einsum("bthf,hfd->bthd", read, x[7])], OUTPUTS[:1], TIGHT)


def test_forgetting_pulls_towards_the_initial_weights() -> None:
    x = MLP.make(sequence=200)
    _, (offset, _) = mlp_scan(
        *x[:3], torch.full_like(x[3], 0.2), None, 0 * x[5], (x[6], x[7]), state=(x[8], x[9]), chunk=16
    )
    assert offset.norm() < 1e-15 * x[8].norm()


def test_recomputation_changes_nothing_and_keeps_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SPAN_CPU", 8 * 4 * 2 * 2 * 16 * 32)
    x = MLP.make(1, 512, 4, 16, hidden=16, seed=9, dtype=torch.float32)
    with torch.no_grad():
        x[5].mul_(0.01)
    MLP.assert_recomputation_keeps_little(x, kept_bytes(4, 512, 16, 16, states=2, chunk=16), monkeypatch, chunk=16)


def test_a_clip_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clip is 0.0; expected a value above 0"):
        MLP.run(MLP.make(), clip=0.0)
