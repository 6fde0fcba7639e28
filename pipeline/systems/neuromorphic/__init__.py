"""Neuromorphic language model: recurrent columns with working, procedural and episodic memory, trained in phases."""

from pipeline.config import RunConfig
from pipeline.system import System


def create(config: RunConfig) -> System:
    """The system of a run whose model section is a `NeuromorphicConfig`."""
    from pipeline.systems.neuromorphic.system import NeuromorphicSystem

    return NeuromorphicSystem(config)
