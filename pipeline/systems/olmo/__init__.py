"""OLMo language models, trained from random weights: the 1B of February 2024, of July 2024, and OLMo 2."""

from __future__ import annotations

from pipeline.config import RunConfig
from pipeline.system import System


def create(config: RunConfig) -> System:
    """The system of a run whose model section is an `OlmoConfig`."""
    from pipeline.systems.olmo.system import OlmoSystem

    return OlmoSystem(config)
