"""The recipe of the phased system."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import RunConfig
from tests.toy_systems.phased import phased


def phased_tiny() -> RunConfig:
    """Three phases of five steps at most, on a few dozen numbers."""
    return phased(Path("outputs/phased_tiny"), threshold=0.0)
