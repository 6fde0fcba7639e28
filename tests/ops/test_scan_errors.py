"""Arguments that the memory op refuses, and the messages that name them."""

import pytest
import torch

from pipeline.ops import miras_scan
from pipeline.parallel.scan import sequence_scan
from pipeline.parallel.topology import Topology
from tests.ops.scan_cases import make, place, run


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
        (0, lambda z: z.int(), "q is int32; expected float64 or float32 or bfloat16 or float16"),
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


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("index", "name"), [(0, "q"), (4, "eta"), (7, r"state\[1\] \(S\)")])
def test_over_sequence_ranks_the_same_is_refused_before_any_collective(ranks: int, index: int, name: str) -> None:
    """As in one process: the group is none that could be asked. The rule ``delta`` has no eta to refuse."""
    x = [z.detach() for z in place(make(sequence=6, key_dim=32, value_dim=32), "cpu")]
    wrong = [*x[:index], x[index].double(), *x[index + 1 :]]
    state = (wrong[6], wrong[7]) if index != 0 else None
    topology = Topology(0, ranks, ranks, object())  # type: ignore[arg-type]
    options = {"topology": topology, "state": state}
    if index != 7:
        with pytest.raises(ValueError, match=rf"^{name} is float64 .* backend 'cpu' expects float32"):
            sequence_scan(*wrong[:6], **options, backend="cpu")
    else:
        with pytest.raises(ValueError, match=rf"^{name} is float64; expected float32"):
            sequence_scan(*wrong[:6], **options, backend="cpu")
    with pytest.raises(ValueError, match="backend is 'fast'"):
        sequence_scan(*x[:6], topology=topology, state=(x[6], x[7]), backend="fast")
    if ranks == 1 and index == 4:
        sequence_scan(*wrong[:6], **options, backend="cpu", rule="delta")


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
