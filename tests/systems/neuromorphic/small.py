"""A small model with weights that are not those of the start, in float64, and texts of several documents."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.batch import IGNORED
from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.model.model import NeuromorphicModel
from pipeline.systems.neuromorphic.weights import initialise

SIZES = NeuromorphicConfig(
    tier="tiny", vocab=20, span=8, width=16, layers=2, columns=2, slots=3, window=12, working_width=8, working_heads=2,
    episodes=6, episodic_width=6, retrieved=2, candidates=3, decoder_width=8, decoder_heads=2, decoder_layers=1,
    thalamic_tokens=2,
)  # fmt: skip
EOS = 0


def small_model(dtype: torch.dtype = torch.float64, config: NeuromorphicConfig = SIZES) -> NeuromorphicModel:
    model = NeuromorphicModel(config)
    initialise(model, 3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def documents(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, segment ids and positions of ids [rows, tokens], token by token; the last label is not known."""
    labels, segments, positions = (torch.zeros_like(ids) for _ in range(3))
    for row in range(ids.shape[0]):
        document = position = 0
        for t in range(ids.shape[1]):
            segments[row, t], positions[row, t] = document, position
            ended = int(ids[row, t]) == EOS
            labels[row, t] = IGNORED if ended or t + 1 == ids.shape[1] else ids[row, t + 1]
            document, position = (document + 1, 0) if ended else (document, position + 1)
    return labels, segments, positions
