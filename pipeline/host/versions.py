"""Versions of what decides the numbers."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

import torch

from pipeline import __version__

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy", "safetensors", "flash-attn")


@functools.cache
def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of what decides the numbers; None where a package is not installed."""
    found: dict[str, str | None] = {"mnemos": __version__, "python": platform.python_version()}
    found |= {package: _installed(package) for package in PACKAGES}
    found["cuda"] = torch.version.cuda
    return found
