"""Context vectors by a fixed point: a recurrent language model whose contexts are learnt first, tokens afterwards."""

from pipeline.config import RunConfig
from pipeline.system import System


def create(config: RunConfig) -> System:
    """The system of a run whose model section is a CvfpConfig."""
    from pipeline.systems.cvfp.system import CvfpSystem

    return CvfpSystem(config)
