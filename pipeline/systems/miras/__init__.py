"""A pretrained decoder (OLMo2 by default) with MIRAS neural long-term memory."""

from __future__ import annotations

from pipeline.config import RunConfig
from pipeline.system import System


def create(config: RunConfig) -> System:
    """The system of a run whose model section is a `MirasConfig`."""
    from pipeline.systems.miras.system import MirasSystem

    return MirasSystem(config)
