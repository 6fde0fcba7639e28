"""torch.compile for functions of ops that are called with the shapes of training, evaluation and generation alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def fused(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` compiled, once per process and only when it is first wanted; `options` are those of torch.compile.

    Shapes, dtypes, grad mode and which inputs need a gradient each make a variant, and beyond torch's default of 8 a
    function runs uncompiled, or fails with `fullgraph`.
    """
    return torch.compile(function, recompile_limit=64, **options)  # type: ignore[call-overload]
