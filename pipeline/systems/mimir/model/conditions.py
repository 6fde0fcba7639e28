"""What the model is told beside the noisy residues: the time, the label and the target."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.systems.mimir.config import MimirConfig
from pipeline.systems.mimir.model.sequences import TargetEncoder

LONGEST_PERIOD = 10_000.0
"""Of the sines and cosines of the time, as in Vaswani et al. (arXiv:1706.03762, section 3.5)."""


def waves(level: Tensor, width: int) -> Tensor:
    """Cosines and sines of the time, [rows, width] float32, with periods from 2 pi to 2 pi `LONGEST_PERIOD`."""
    steps = torch.arange(width // 2, device=level.device, dtype=torch.float32) / (width // 2)
    angles = level.float()[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """An MLP d -> 4d -> d of the time's waves: 8 d^2 + 5 d parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, level: Tensor) -> Tensor:
        """[rows, d] of level [rows], as `Kernel.level` gives it."""
        return self.down(F.gelu(self.up(waves(level, self.width).to(self.up.weight.dtype))))


class Labels(nn.Module):
    """A vector for each of two labels; none is added where the label is withheld."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, width)

    def forward(self, labels: Tensor) -> Tensor:
        """[rows, d] of labels [rows] int64, -1 where it is withheld."""
        return self.embedding(labels.clamp(min=0)) * (labels >= 0)[:, None]


class TargetTable(nn.Module):
    """A vector for each target that training knows, and the last for no target: (n + 1) d parameters."""

    def __init__(self, targets: int, width: int) -> None:
        super().__init__()
        self.targets = targets
        self.embedding = nn.Embedding(targets + 1, width)

    def forward(self, targets: Tensor) -> Tensor:
        """[rows, d] of targets [rows] int64, 0..n-1; any other number is no target."""
        known = (targets >= 0) & (targets < self.targets)
        return self.embedding(torch.where(known, targets, self.targets))


class EncodedTargets(nn.Module):
    """A vector of each target's sequence, and a learned one for no target."""

    def __init__(self, config: MimirConfig) -> None:
        super().__init__()
        self.encoder = TargetEncoder(config.encoder, config.width)
        self.nothing = nn.Embedding(1, config.width)

    def forward(self, ids: Tensor, rows: Tensor) -> Tensor:
        """[rows, d] of `TargetSequences`."""
        vectors = torch.cat([self.nothing.weight, self.encoder(ids)])
        return vectors[rows + 1]
