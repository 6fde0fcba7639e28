"""Packages from a folder of wheels, for a machine where nothing can be downloaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import UserError


def install_missing(wheels: Path, site: Path) -> list[str]:
    """Installs into ``site`` what ``wheels`` holds and this Python lacks; returns the wheels' names.

    Nothing is resolved and no index is asked: the folder holds all that is wanted, each package once.
    """
    if not wheels.is_dir():
        raise UserError(f"WHEELS is {wheels}, which is no folder: name one that holds .whl files")
    missing = [path for path in sorted(wheels.glob("*.whl")) if not _installed(path.name.split("-")[0])]
    if missing:
        command = [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"),
            *("--no-cache-dir", "--disable-pip-version-check", "--upgrade", "--target", str(site), *map(str, missing)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"the packages of {wheels} cannot be installed ({last}): give each once, for this Python")
    return [path.name for path in missing]


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def lacking(modules: Iterable[str]) -> list[str]:
    """Those that cannot be found for import."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def versions() -> dict[str, str]:
    """Of this Python and of every package that decides the numbers, as far as installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in (
        *("torch", "triton", "deepspeed", "transformers", "datasets", "numpy", "einops", "safetensors"),
        *("flash-attn", "flash-attn-4", "fla-core", "flash-linear-attention", "titans-pytorch"),
    ):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def tool_version(command: str) -> str | None:
    """The release that a tool of the CUDA toolkit names, or None where it does not run."""
    try:
        answer = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"(?:release|[Vv]ersion)\s+([\d.]+)", answer.stdout)
    return release[1] if release else None
