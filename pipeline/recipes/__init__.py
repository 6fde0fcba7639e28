"""Every recipe: a function of the modules in this folder that returns a RunConfig."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

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


def read_foreign(content: dict[str, Any], where: str) -> RunConfig | None:
    """The config that another trainer's YAML file means, by the module here whose `read_foreign` knows its form; None
    where none does. `where` begins its messages. Raises UserError."""
    for info in pkgutil.iter_modules(__path__):
        reader = getattr(importlib.import_module(f"{__name__}.{info.name}"), "read_foreign", None)
        found = None if reader is None else reader(content, where)
        if found is not None:
            return found
    return None


def in_own_flags(recipe: Callable[[], RunConfig], words: Sequence[str]) -> list[str]:
    """The words of a command line with settings of another trainer in the form of flags, by the function of this name
    in the recipe's module, where it has one. Raises UserError."""
    translate = getattr(inspect.getmodule(recipe), "in_own_flags", None)
    return list(words) if translate is None else translate(words)


def describe(recipe: Callable[[], RunConfig]) -> str:
    """The first line of a recipe's docstring."""
    return (inspect.getdoc(recipe) or "").splitlines()[0]
