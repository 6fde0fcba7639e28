"""Functions whose result torch.compile may take for a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """As torch.compiler.assume_constant_result, which imports the compiler for it: two seconds of every process that
    only imports an op."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
