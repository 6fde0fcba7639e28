"""Fused functions stay compiled beyond torch's limit of variants, with a torch.compile of 2.10 and one of today."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from pipeline.ops import fuse
from pipeline.ops.rope import Rope, turn

WITH_LIMIT = torch.compile


def without_limit(
    model: Callable[..., Any] | None = None,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    backend: Any = "inductor",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    disable: bool = False,
) -> Callable[..., Any]:
    """torch.compile with the parameters that it had before 2.13."""
    return WITH_LIMIT(
        model, fullgraph=fullgraph, dynamic=dynamic, backend=backend, mode=mode, options=options, disable=disable
    )


@pytest.fixture(params=["this torch", "torch before 2.13"])
def any_torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param != "this torch":
        monkeypatch.setattr(torch, "compile", without_limit)
    fuse.fused.cache_clear()
    torch._dynamo.reset()
    yield
    fuse.fused.cache_clear()
    torch._dynamo.reset()


def grow(x: Tensor) -> Tensor:
    return 2 * x + 1


@pytest.mark.usefixtures("any_torch")
def test_more_variants_than_torchs_limit_run_compiled() -> None:
    limit = torch._dynamo.config.recompile_limit
    counter = CompileCounter()
    compiled = fuse.fused(grow, backend=counter, dynamic=False, fullgraph=True)
    lengths = range(1, limit + 6)
    for length in [*lengths, *lengths]:
        assert torch.equal(compiled(torch.ones(length)), torch.full((length,), 3.0))
    assert counter.frame_count == len(lengths) > limit


@pytest.mark.usefixtures("any_torch")
def test_the_limit_of_everything_else_stays() -> None:
    limit = torch._dynamo.config.recompile_limit
    compiled = fuse.fused(grow, backend="eager")
    threads = [threading.Thread(target=compiled, args=(torch.ones(3),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(TypeError):
        compiled()
    assert torch._dynamo.config.recompile_limit == limit
    counter = CompileCounter()
    other = torch.compile(grow, backend=counter, dynamic=False)
    for length in range(1, limit + 6):
        other(torch.ones(length))
    assert counter.frame_count <= limit


@pytest.mark.usefixtures("any_torch")
def test_a_fused_function_may_be_a_part_of_a_larger_graph() -> None:
    inner = fuse.fused(turn, backend="eager", dynamic=True)
    counter = CompileCounter()
    rotation = Rope(torch.tensor([1.0, 0.1])).rotation(torch.arange(5))
    x = torch.randn(1, 5, 2, 4)
    outer = torch.compile(lambda z: 2 * inner(z, *rotation), fullgraph=True, backend=counter)
    assert torch.equal(outer(x), 2 * turn(x, *rotation))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("any_torch")
def test_a_function_is_compiled_once_per_choice_of_options() -> None:
    assert fuse.fused(grow, dynamic=True) is fuse.fused(grow, dynamic=True)
    assert fuse.fused(grow, dynamic=True) is not fuse.fused(grow, fullgraph=True)
