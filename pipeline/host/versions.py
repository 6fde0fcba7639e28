"""Versions of what decides the numbers."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from pipeline import __version__

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy", "safetensors", "flash-attn")


def versions() -> dict[str, str | None]:
    """Versions of what decides the numbers; None where a package is not installed."""
    found: dict[str, str | None] = {"mnemos": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    return found
