"""The classes of this package's own models, for the Auto classes of transformers."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

SYSTEMS = "pipeline.systems"
MODULE = "causal_lm"
"""Of a system's folder: the module with its class of transformers, and with `register()`."""


def register_auto_classes() -> None:
    """Makes `AutoConfig` and `AutoModelForCausalLM` know the class of every system that has one, in this process."""
    for system in pkgutil.iter_modules(importlib.import_module(SYSTEMS).__path__):
        name = f"{SYSTEMS}.{system.name}.{MODULE}"
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name).register()
