"""Where the project's own files are: beside this package in a checkout, inside it where a wheel was installed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = "ds_configs"
COMMIT = "_commit"
"""The file in which setup.py notes the commit that a wheel was built from."""


def config_folder(package: Path = PACKAGE) -> Path:
    """The folder of the DeepSpeed configurations that `--zero NAME` names."""
    installed = package / CONFIGS
    return installed if installed.is_dir() else package.parent / CONFIGS


def built_commit(package: Path = PACKAGE) -> str | None:
    """The commit that an installed package was built from, with `+` when files differed from it; None if not known."""
    try:
        return (package / COMMIT).read_text().strip() or None
    except OSError:
        return None


def how_to_set_up(package: Path = PACKAGE) -> str:
    """What brings missing dependencies and native kernels, for the end of a message."""
    if (package.parent / "launch.sh").is_file():
        return "run ./launch.sh --setup-only"
    return "install mnemos again, after torch and with pip's --no-build-isolation"
