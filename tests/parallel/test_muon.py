"""DeepSpeed's Muon is whole, and compiles what it is made of when that is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.runtime import compiler

from pipeline.parallel.muon import MUON, import_muon

KERNELS = "deepspeed.runtime.zero.muon.original_muon"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of functions in the order in which they are compiled."""
    found: list[str] = []

    def noted(*arguments: Any, **settings: Any) -> Callable[..., Any]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            found.append(function.__name__)
            return function

        return decorate

    monkeypatch.setattr(compiler, "compile", noted)
    for name in (MUON, KERNELS):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return found


def test_an_import_compiles_nothing_and_a_call_does_once(compiled: list[str]) -> None:
    given = compiler.compile
    import_muon()
    assert compiled == [] and compiler.compile is given
    kernels = importlib.import_module(KERNELS)
    gradient = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    for _ in range(2):
        found = kernels.zeropower_via_newtonschulz5(gradient, steps=5)
    assert compiled == ["zeropower_via_newtonschulz5"]
    expected = kernels.zeropower_via_newtonschulz5.__wrapped__(gradient, steps=5)
    assert torch.equal(found, expected) and found.shape == (4, 3)


def test_what_is_imported_already_is_left_alone(compiled: list[str]) -> None:
    import_muon()
    first = sys.modules[MUON]
    import_muon()
    assert sys.modules[MUON] is first


def test_an_import_that_fails_leaves_the_compiler_as_it_was(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = compiler.compile
    monkeypatch.setitem(sys.modules, KERNELS, None)
    with pytest.raises(NameError):  # as DeepSpeed fails where its kernels cannot be imported
        import_muon()
    assert compiler.compile is given


def test_a_deepspeed_without_it_there_starts(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.parallel.muon.MUON", "deepspeed.no_such_module")
    import_muon()
    assert compiled == []
