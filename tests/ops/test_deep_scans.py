"""What holds for every deep memory: cuts, segments, causality, precision, and arguments that are refused."""

from collections.abc import Callable

import pytest
import torch

from tests.ops.deep_memories import HIDDEN, MLP, OUTPUTS, SWIGLU, DeepMemory
from tests.ops.scan_cases import assert_close, error

DEEP = [pytest.param(MLP, id="mlp"), pytest.param(SWIGLU, id="swiglu")]


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("cut", [8, 24])
@pytest.mark.parametrize("memory", DEEP)
def test_a_sequence_cut_at_a_chunk_equals_the_whole(memory: DeepMemory, cut: int, momentum: bool) -> None:
    x, ids = memory.make(seed=4), torch.tensor([[0] * 5 + [1] * 14 + [2] * 10, [0] * 29])
    whole = memory.run(x, segment_ids=ids, chunk=8, momentum=momentum)
    state, pieces = x[-2:], []
    for part in (slice(0, cut), slice(cut, 29)):
        now = [*(z[:, part] for z in x[:6]), *x[6:-2], *state]
        y, *state = memory.run(now, segment_ids=ids[:, part], chunk=8, momentum=momentum)
        pieces.append(y)
    memory.assert_same([torch.cat(pieces, dim=1), *state], whole, x)


@pytest.mark.parametrize("memory", DEEP)
def test_segments_that_begin_with_a_chunk_equal_separate_sequences(memory: DeepMemory) -> None:
    lengths = (16, 8, 5)
    x = memory.make(batch=1, seed=5)
    packed = memory.run(x, chunk=8, segment_ids=torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None])
    zeros = [torch.zeros_like(part) for part in x[-2:]]
    pieces = []
    for index, part in enumerate(zip(*(z.split(lengths, dim=1) for z in x[:6]), strict=True)):
        y, *state = memory.run([*part, *x[6:-2], *(x[-2:] if index == 0 else zeros)], chunk=8)
        pieces.append(y)
    memory.assert_same(packed, [torch.cat(pieces, dim=1), *state], x)


@pytest.mark.parametrize(
    ("memory", "border", "end", "options"),
    [pytest.param(MLP, 20, 13, {"clip": 1.0}, id="mlp"), pytest.param(SWIGLU, 12, 20, {"muon": True}, id="swiglu")],
)
def test_nothing_crosses_a_segment_border_or_goes_back_in_time(
    memory: DeepMemory, border: int, end: int, options: dict
) -> None:
    """The border is inside a chunk; ``end``: of the tokens whose past is looked at."""
    x = memory.make(seed=6)
    ids = torch.zeros(2, 29, dtype=torch.int64)
    ids[:, border:] = 1
    y = memory.run(x, chunk=8, segment_ids=ids, **options)[0]
    after = torch.autograd.grad(y[:, border:].sum(), x, materialize_grads=True, retain_graph=True)
    for name, gradient in zip(memory.names[:6], after, strict=False):
        assert not gradient[:, :border].any(), name
    assert not after[-2].any()
    assert not after[-1].any()
    for gradient in torch.autograd.grad(y[:, :end].sum(), x[:6]):
        assert not gradient[:, end:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", DEEP)
def test_low_precision_inputs(memory: DeepMemory, dtype: torch.dtype) -> None:
    x = [z.detach() for z in memory.make(1, 48, 2, 8, dtype=torch.float32)]
    x[:3] = [z.to(dtype) for z in x[:3]]
    x = [z.requires_grad_() for z in x]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = memory.run(x, chunk=8)
    expected = memory.run(x, loop=True, chunk=8)
    assert [z.dtype for z in actual] == [dtype, torch.float32, torch.float32]
    assert_close(actual[1:], expected[1:], OUTPUTS[1:], 1e-5)
    assert error(actual[0], expected[0]) <= (4e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("memory", DEEP)
def test_the_state_is_its_own(memory: DeepMemory) -> None:
    for momentum in (True, False):
        for part in memory.run(memory.make(), momentum=momentum)[1:]:
            assert part.is_contiguous()
            assert part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize(
    ("memory", "name", "change", "message"),
    [
        (MLP, "v", lambda z: z[..., :3], r"v has shape \[2, 29, 2, 3\]; expected that of q"),
        (MLP, "W1", lambda z: z[:1], r"initial\[0\] \(W1\) has shape \[1, 5, 4\]; expected \[2, 5, 4\]"),
        (MLP, "W2", lambda z: z[:, :4], r"initial\[1\] \(W2\) has shape \[2, 4, 4\]; expected \[2, 5, 4\]"),
        (MLP, "D0", lambda z: z[:, :, :5], r"state\[0\] \(M\) has shape \[2, 2, 5, 4\]; expected \[2, 2, 10, 4\]"),
        (MLP, "theta", lambda z: z.bfloat16(), "theta is bfloat16"),
        (SWIGLU, "v", lambda z: z[..., :3], r"v has shape \[2, 29, 2, 3\]; expected that of q"),
        (
            SWIGLU,
            "up",
            lambda z: z[:1],
            rf"initial\[1\] \(up\) has shape \[1, {HIDDEN}, 4\]; expected \[2, {HIDDEN}, 4\]",
        ),
        (SWIGLU, "D0", lambda z: z[:, :, :5], r"state\[0\] \(M\) has shape \[2, 2, 5, 4\]; expected \[2, 2, 15, 4\]"),
        (SWIGLU, "eta", lambda z: z[:, :5], r"eta has shape \[2, 5, 2\]"),
    ],
)
def test_wrong_tensors_are_named(memory: DeepMemory, name: str, change: Callable, message: str) -> None:
    x = [change(z.detach()) if of == name else z.detach() for of, z in zip(memory.names, memory.make(), strict=True)]
    with pytest.raises(ValueError, match=message):
        memory.run(x)
