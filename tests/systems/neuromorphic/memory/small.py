"""Small memories with weights that are not those of the start, in float64, and states in which something is written."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.systems.neuromorphic.columns import unit
from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.memory.episodic import EpisodicMemory
from pipeline.systems.neuromorphic.memory.procedural import ProceduralMemory
from pipeline.systems.neuromorphic.state import EpisodicState, ProceduralState

ROWS, TOKENS = 2, 7
M = TypeVar("M", bound=nn.Module)


def config(**changes: Any) -> NeuromorphicConfig:
    sizes = {
        "vocab": 20, "span": 8, "width": 12, "layers": 2, "columns": 2, "slots": 3, "window": 12, "working_width": 8,
        "working_heads": 2, "episodes": 6, "episodic_width": 4, "retrieved": 3, "candidates": 4, "decoder_width": 8,
        "decoder_heads": 2, "decoder_layers": 1, "thalamic_tokens": 2,
    }  # fmt: skip
    return NeuromorphicConfig(tier="tiny", **(sizes | changes))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(module: M, seed: int = 1) -> M:
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module


def procedural(**changes: Any) -> ProceduralMemory:
    return filled(ProceduralMemory(config(**changes)))


def procedural_state(memory: ProceduralMemory, seed: int = 2, strength: float = 1.0) -> ProceduralState:
    shape = (ROWS, *memory.initial_keys.shape)
    keys, values, eligible_keys, eligible_values = random(4, *shape, seed=seed)
    strengths = strength * random(*shape[:-1], seed=seed + 1).abs()
    return ProceduralState(unit(keys), unit(values), strengths, eligible_keys, eligible_values)


def episodic(**changes: Any) -> EpisodicMemory:
    return filled(EpisodicMemory(config(**changes)))


def episodic_state(memory: EpisodicMemory, there: int = 3, seed: int = 4) -> EpisodicState:
    """The first `there` slots of every column hold episodes."""
    shape = (ROWS, memory.columns, memory.episodes, memory.width)
    strengths = random(*shape[:-1], seed=seed).abs()
    strengths[..., there:] = 0
    return EpisodicState(unit(random(*shape, seed=seed + 1)), random(*shape, seed=seed + 2), strengths)
