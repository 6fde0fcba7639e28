"""DeepSpeed's Muon, which no run uses and every start imports, without the compilation of its kernels."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from deepspeed.runtime import compiler

MUON = "deepspeed.runtime.zero.muon.muon_optimizer"


def import_muon() -> None:
    """Imports it as DeepSpeed would when it starts; its kernels are compiled once they are called.

    With ZeRO, DeepSpeed 0.19.8 compares the optimizer's type with it. Compiling as it is imported also imports torch's
    compiler: two seconds of the start of every rank.
    """
    if MUON in sys.modules:
        return
    compile_now = compiler.compile
    compiler.compile = functools.partial(_compile_when_called, compile_now)
    try:
        # A DeepSpeed that has it elsewhere imports it from there itself.
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(MUON)
    finally:
        compiler.compile = compile_now


def _compile_when_called(compile_now: Callable[..., Any], *arguments: Any, **settings: Any) -> Callable[..., Any]:
    """What `compile_now(*arguments, **settings)` decorates a function with, put off to its first call."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = functools.cache(lambda: compile_now(*arguments, **settings)(function))

        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            return compiled()(*given, **named)

        return call

    return decorate
