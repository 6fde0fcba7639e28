"""torch.compile for functions of ops that are called with the shapes of training, evaluation and generation alike."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch

VARIANTS = 64
"""Compiled variants that a function may have; torch's own limit is 8."""

# Torch before 2.13 keeps its limit per process: two threads that raise it at once would leave it raised.
_LIMIT = threading.RLock()


def compile_variants(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` compiled when it is first called; `options` are those of torch.compile.

    Shapes, dtypes, grad mode and which inputs need a gradient each make a variant, and beyond torch's default of 8 a
    function runs uncompiled, or fails with `fullgraph`.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # from torch 2.13 on
        return torch.compile(function, recompile_limit=VARIANTS, **options)  # type: ignore[call-overload]
    compiled = torch.compile(function, **options)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():  # it becomes a part of a larger graph, which has a limit of its own
            return compiled(*arguments, **named)
        with _LIMIT, torch._dynamo.config.patch(recompile_limit=VARIANTS):
            return compiled(*arguments, **named)

    return call


@functools.cache
def fused(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """As `compile_variants`, once per process and only when it is first wanted."""
    return compile_variants(function, **options)
