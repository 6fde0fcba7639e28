"""Every recipe: a function of the modules in this folder that returns a RunConfig."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable

from pipeline.config import RunConfig


def all_recipes() -> dict[str, Callable[[], RunConfig]]:
    """Recipe functions by name: the public functions of these modules that are annotated to return a RunConfig."""
    found: dict[str, Callable[[], RunConfig]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name, function in vars(module).items():
            if name.startswith("_") or not inspect.isfunction(function) or function.__module__ != module.__name__:
                continue
            if function.__annotations__.get("return") in ("RunConfig", RunConfig):
                found[name] = function
    return found


def describe(recipe: Callable[[], RunConfig]) -> str:
    """The first line of a recipe's docstring."""
    return (inspect.getdoc(recipe) or "").splitlines()[0]
