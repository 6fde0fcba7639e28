"""The kernel that a config asks for."""

from __future__ import annotations

from pipeline.systems.mimir.config import MimirConfig
from pipeline.systems.mimir.diffusion.absorbing import AbsorbingKernel
from pipeline.systems.mimir.diffusion.kernel import Kernel
from pipeline.systems.mimir.diffusion.uniform import UniformKernel


def create_kernel(config: MimirConfig) -> Kernel:
    if config.kernel == "absorbing":
        return AbsorbingKernel(config.timesteps, len(config.letters), mask_weight=config.mask_weight)
    return UniformKernel(config.timesteps, len(config.letters))
