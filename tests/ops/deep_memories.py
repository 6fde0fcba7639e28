"""The two deep memories as their tests see them: the op, its float64 loop, and inputs for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import chunks
from pipeline.ops.mlp_scan import mlp_scan
from pipeline.ops.swiglu_scan import swiglu_scan
from tests.ops.family_reference import mlp_loop, swiglu_loop
from tests.ops.saved import saved_by
from tests.ops.scan_cases import TIGHT, assert_close, gradients

OUTPUTS = ("y", "D", "S")
HIDDEN = 5


class DeepMemory(NamedTuple):
    """An op whose state is what has been added to its initial weights."""

    op: Callable[..., tuple[Tensor, tuple[Tensor, Tensor]]]
    loop: Callable[..., tuple[Tensor, tuple[Tensor, Tensor]]]
    """The same from `family_reference`."""
    weights: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the inputs that `make` gives."""
        return ("q", "k", "v", "alpha", "eta", "theta", *self.weights, "D0", "S0")

    def make(
        self,
        batch: int = 2,
        sequence: int = 29,
        heads: int = 2,
        dim: int = 4,
        *,
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

        layers = len(self.weights)
        q, k = (F.normalize(normal(batch, sequence, heads, dim), dim=-1) for _ in range(2))
        v = normal(batch, sequence, heads, dim)
        alpha, eta, theta = 0.1 * uniform(), 0.9 * uniform(), 0.1 * uniform()
        initial = [normal(heads, hidden, dim) for _ in range(layers)]
        state = [0.3 * normal(batch, heads, layers * hidden, dim) for _ in range(2)]
        return [x.to(dtype).clone().requires_grad_() for x in (q, k, v, alpha, eta, theta, *initial, *state)]

    def run(self, x: Sequence[Tensor], *, momentum: bool = True, loop: bool = False, **options) -> list[Tensor]:
        """y, D and S by the op, or by the loop."""
        op = self.loop if loop else self.op
        y, state = op(*x[:4], x[4] if momentum else None, x[5], tuple(x[6:-2]), state=(x[-2], x[-1]), **options)
        return [y, *state]

    def assert_same(self, actual: list[Tensor], expected: list[Tensor], x: list[Tensor], tolerance=TIGHT) -> None:
        """Values, and gradients in x."""
        assert_close(actual, expected, OUTPUTS, tolerance)
        assert_close(gradients(actual, x), gradients(expected, x), self.names, tolerance)

    def assert_same_op(self, x: list[Tensor], tolerance: float = TIGHT, **options) -> None:
        """The op and its loop."""
        self.assert_same(self.run(x, **options), self.run(x, loop=True, **options), x, tolerance)

    def assert_recomputation_keeps_little(
        self, x: list[Tensor], kept_bytes: int, monkeypatch: pytest.MonkeyPatch, **options
    ) -> None:
        """A call keeps about ``kept_bytes``; recomputed, a third of that at most, and the bits are the same."""

        def both() -> tuple[list[Tensor], int]:
            outputs, kept = saved_by(lambda: self.run(x, **options))
            return [*outputs, *gradients(outputs, x)], kept

        expected, whole = both()
        assert whole == pytest.approx(kept_bytes, rel=0.25)
        monkeypatch.setattr(chunks, "KEEP", 0)
        actual, less = both()
        assert less < whole / 3
        for name, a, b in zip((*OUTPUTS, *self.names), actual, expected, strict=True):
            assert torch.equal(a, b), name


MLP = DeepMemory(mlp_scan, mlp_loop, ("W1", "W2"))
SWIGLU = DeepMemory(swiglu_scan, swiglu_loop, ("gate", "up", "down"))
