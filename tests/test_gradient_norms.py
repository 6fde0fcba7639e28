"""Norms of gradients by part: of what is trained, over all parameters of a part, without the loss scale."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.gradient_norms import gradient_norms


class Measuring:
    def gradient_squares(self, name: str, gradient: Tensor) -> dict[str, Tensor]:
        part = name.partition(".")[0]
        return {f"gnorm_{part}": gradient.square().sum(), "gnorm_all": gradient.square().sum()}


def a_run(system: Any, scale: float | None = None) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 1), "frozen": nn.Linear(3, 3)})
    model["frozen"].requires_grad_(False)
    model["second"](model["frozen"](model["first"](torch.randn(4, 3)))).sum().mul(scale or 1.0).backward()
    engine = SimpleNamespace(
        module=model, gradient=lambda p: p.grad, loss_scale=None if scale is None else SimpleNamespace(value=scale)
    )
    return SimpleNamespace(system=system, engine=engine, device=torch.device("cpu"))


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_norms_of_parts(scale: float | None) -> None:
    run = a_run(Measuring(), scale)
    found = gradient_norms(run)
    assert found is not None
    plain = a_run(Measuring()).engine.module
    for name, (value, count) in found.metrics.items():
        part = name.removeprefix("gnorm_")
        of = plain if part == "all" else plain[part]
        expected = torch.cat([p.grad.flatten() for p in of.parameters() if p.grad is not None]).norm()
        torch.testing.assert_close(value, expected)
        assert count == 1
    assert set(found.metrics) == {"gnorm_first", "gnorm_second", "gnorm_all"}


def test_a_system_that_measures_none_has_none() -> None:
    assert gradient_norms(a_run(object())) is None
