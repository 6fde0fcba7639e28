"""The memory op equals a token loop that this project did not write: values, final state and every gradient."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.fla_oracle import momentum_loop, needs_fla_core
from tests.ops.scan_cases import BACKENDS, NAMES, OUTPUTS, TIGHT, assert_close, error, gradients, make, place, run

ROOT = Path(__file__).resolve().parents[2]
FP32 = 1e-5
# batch, tokens, heads, key dim, value dim
SHAPES = [(2, 65, 2, 32, 32), (1, 200, 3, 64, 48), (2, 33, 1, 128, 16), (3, 1, 2, 32, 80)]


def inputs(*shape: int, repeated: int = 0, seed: int = 0) -> list[Tensor]:
    """In the stable region, with a carried state; ``repeated``: a head has so many keys, in random turns."""
    x = make(*shape, seed=seed, gates="model")
    if repeated:
        rng = torch.Generator().manual_seed(seed)
        turns = torch.randint(min(repeated, x[1].shape[1]), (x[1].shape[1],), generator=rng)
        x[1] = x[1].detach()[:, turns].requires_grad_()
    return x


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor], x: Sequence[Tensor], tolerance: float) -> None:
    """Values, final state and the gradients of all inputs; prints the largest relative RMSE."""
    assert [z.dtype for z in expected] == [z.dtype for z in actual], "the loop does not round what it is compared with"
    actual, expected = ([*outputs, *gradients(outputs, x)] for outputs in (actual, expected))
    print(f"largest relative RMSE: {max(error(a, b) for a, b in zip(actual, expected, strict=True) if b.any()):.1e}")
    assert_close(actual, expected, (*OUTPUTS, *NAMES), tolerance)


def test_set_up_installs_the_oracle() -> None:
    """So that no test below is skipped where set-up made the environment."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    extras = next(ast.literal_eval(node.value) for node in assigned if ast.unparse(node.targets[0]) == "EXTRAS")
    assert any(wanted.startswith("fla-core>=") for wanted in extras["dev"])
    assert any(line.startswith("fla-core==") for line in (ROOT / "constraints.txt").read_text().splitlines())


@needs_fla_core
@pytest.mark.parametrize("repeated", [0, 1, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cuda"])
def test_every_backend_equals_it_in_float32(backend: str, shape: tuple[int, ...], repeated: int) -> None:
    x = place(inputs(*shape, repeated=repeated), backend)
    assert_equal(run(x, backend=backend), momentum_loop(x), x, FP32)


@needs_fla_core
@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (2, 90, 2, 9, 9))),
    repeated=st.integers(0, 3),
    seed=st.integers(0, 999),
    chunk=st.sampled_from([1, 7, 16, 64]),
)
def test_the_torch_path_equals_it_in_float64(shape: tuple[int, ...], repeated: int, seed: int, chunk: int) -> None:
    x = inputs(*shape, repeated=repeated, seed=seed)
    assert_equal(run(x, backend="torch", chunk=chunk), momentum_loop(x), x, TIGHT)


@needs_fla_core
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cuda"])
def test_packed_documents_equal_it_one_by_one(backend: str) -> None:
    """The loop knows no documents: it is given each alone, and only the first finds a state."""
    lengths, x = (40, 1, 64, 30), inputs(2, 135, 2, 32, 32)
    x = place(x, backend) if backend != "torch" else x
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    outputs, state = [], x[6:]
    for document in zip(*(z.split(lengths, dim=1) for z in x[:6]), strict=True):
        y, *last = momentum_loop([*document, *state])
        outputs.append(y)
        state = [torch.zeros_like(z) for z in last]
    expected = [torch.cat(outputs, dim=1), *last]
    assert_equal(run(x, segment_ids=ids, backend=backend), expected, x, TIGHT if backend == "torch" else FP32)
