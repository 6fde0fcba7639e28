"""Arguments that the affine scan refuses, and the messages that name them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.ops.affine_scan import affine_scan
from tests.ops.affine_scan_cases import make


def _replace(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    a, b, state = (z.detach() for z in make(2, 5, 4, 6, a=torch.float32))
    arguments = {"a": a, "b": b, "state": state, "segment_ids": torch.zeros(2, 5, dtype=torch.int64)}
    return arguments | {name: change(arguments[name])}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("b", lambda z: z[:, 0, 0, 0], r"b has shape \[2\]; expected \[batch, sequence, \*features\]"),
        ("b", lambda z: z[:, :0], r"b has shape \[2, 0, 4, 6\]"),
        ("b", lambda z: z.int(), "b is int32; expected float64 or float32 or bfloat16 or float16"),
        ("a", lambda z: z[:, :4], r"a has shape \[2, 4, 4, 6\]; expected that of b, \[2, 5, 4, 6\], or 1 in place"),
        ("a", lambda z: z[:, :1], r"a has shape \[2, 1, 4, 6\]"),
        ("a", lambda z: z[..., 0], r"a has shape \[2, 5, 4\]"),
        ("a", lambda z: z.int(), "a is int32; expected float64 or float32 or bfloat16"),
        ("a", lambda z: z.to("meta"), "a is on meta; expected the device of b, cpu"),
        ("state", lambda z: z[:1], r"state has shape \[1, 4, 6\]; expected \[2, 4, 6\]"),
        ("state", lambda z: z.bfloat16(), "state is bfloat16; expected float32"),
        ("state", lambda z: z.double(), "state is float64; expected float32"),
        ("state", lambda z: z.to("meta"), "state is on meta"),
        ("segment_ids", lambda z: z[:, :4], r"segment_ids has shape \[2, 4\]; expected \[2, 5\]"),
        ("segment_ids", lambda z: z.float(), "segment_ids is float32; expected an integer type"),
        ("segment_ids", lambda z: z.bool(), "segment_ids is bool; expected an integer type"),
        ("segment_ids", lambda z: z.to("meta"), "segment_ids is on meta"),
    ],
)
def test_wrong_tensors_are_named(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    arguments = _replace(name, change)
    with pytest.raises(ValueError, match=message):
        affine_scan(arguments.pop("a"), arguments.pop("b"), **arguments)


@pytest.mark.parametrize(
    ("name", "change", "backend", "message"),
    [
        ("a", lambda z: z, "fast", "backend is 'fast'; expected 'auto', 'torch', 'cpu' or 'cuda'"),
        ("a", lambda z: z, "cuda", r"a is float32 \[2, 5, 4, 6\] .* on cpu; backend 'cuda' expects a cuda tensor"),
        (
            "a",
            lambda z: z.mT.contiguous().mT,
            "cuda",
            r"a is float32 \[2, 5, 4, 6\] with strides \[120, 24, 1, 4\] on cpu; .* a cuda tensor",
        ),
    ],
)
def test_what_a_forced_backend_cannot_take_is_named(
    name: str, change: Callable[[Tensor], Tensor], backend: str, message: str
) -> None:
    arguments = _replace(name, change)
    with pytest.raises(ValueError, match=message):
        affine_scan(arguments.pop("a"), arguments.pop("b"), backend=backend, **arguments)


def test_float64_is_for_pytorch() -> None:
    x = make(1, 5, 2)
    assert affine_scan(*x[:2])[0].dtype == torch.float64
    with pytest.raises(ValueError, match=r"a is float64 \[1, 5, 2\] .*; backend 'cpu' expects float32 or bfloat16"):
        affine_scan(*x[:2], backend="cpu")
