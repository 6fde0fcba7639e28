"""What the memory op keeps for its backward pass on the PyTorch path, and what it computes again there."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.ops import chunks, scan_torch
from tests.ops.saved import saved_by
from tests.ops.scan_cases import NAMES, gradients, make, run, segments


def test_memory_for_the_backward_pass_grows_linearly() -> None:
    def saved(sequence: int) -> int:
        x = make(1, sequence, 1, 4, 4, dtype=torch.float32)
        outputs, total = saved_by(lambda: run(x, chunk=16))
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
    monkeypatch.setattr(chunks, "SPAN_CPU", 2 * 4 * 8 * 16)
    x = make(2, 75, 2, gates="model", dtype=dtype)
    calls = []
    real = scan_torch._span
    monkeypatch.setattr(scan_torch, "_span", lambda *args, **sizes: calls.append(1) or real(*args, **sizes))

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
    monkeypatch.setattr(chunks, "KEEP", 0)
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
    monkeypatch.setattr(chunks, "SPAN_CPU", 16 * 4 * 2 * 64 * 32)

    def kept() -> int:
        x = make(2, 4096, 2, 32, 32, dtype=torch.float32)
        outputs, total = saved_by(lambda: run(x, backend="torch"))
        assert outputs[0].requires_grad
        return total

    whole = kept()
    assert whole == pytest.approx(scan_torch.kept_bytes(4, 4096, 32, 32, **sizes), rel=0.05)
    monkeypatch.setattr(chunks, "KEEP", 0)
    span = chunks.span_tokens(4, 32, 32, **sizes, device_type="cpu")
    assert 1 < 4096 / span <= 8
    # q, k, v, three gates, and the states at every span's start.
    assert kept() <= 1.05 * 4 * 4 * (4096 * (3 * 32 + 3) + 2 * 32 * 32 * (4096 // span + 1)) < whole / 8


def test_what_fits_a_laptop_is_kept() -> None:
    sizes = {"key_dim": 32, "value_dim": 32, "states": 2, "chunk": 64}
    assert not scan_torch.recomputes(4, 16_384, **sizes, span=64)
    assert scan_torch.recomputes(128, 65_536, **sizes, span=64)
    assert not scan_torch.recomputes(128, 65_536, **sizes, span=65_536)
