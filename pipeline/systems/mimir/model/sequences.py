"""Amino-acid sequences of targets as ids, and the encoder that makes a vector of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pipeline.systems.mimir.config import LETTERS, EncoderConfig

PADDING, OTHER = 0, len(LETTERS) + 1
"""Ids beside those of the letters, 1 to `len(LETTERS)`: beyond the end, and any other character."""
WINDOW = 9
"""Residues that a convolution reads, about the turn of an alpha helix on each side of the middle one."""
QUERIES = 8
"""Weighted means that a sequence is pooled to."""


class TargetSequences(NamedTuple):
    """The targets of a micro-batch: ids [targets, T] int64, `PADDING` beyond the end; rows [rows] int64 says which of
    them is whose, -1 where there is none."""

    ids: Tensor
    rows: Tensor


def encode(sequences: Sequence[str], longest: int) -> np.ndarray:
    """Ids of the first `longest` residues of amino-acid sequences, [sequences, T] uint8, T that of the longest."""
    table = np.full(256, OTHER, dtype=np.uint8)
    table[[ord(letter) for letter in LETTERS]] = np.arange(1, len(LETTERS) + 1)
    width = max((min(len(sequence), longest) for sequence in sequences), default=0)
    ids = np.full((len(sequences), max(1, width)), PADDING, dtype=np.uint8)
    for row, sequence in zip(ids, sequences, strict=True):
        letters = np.frombuffer(sequence[:longest].upper().encode("ascii", "replace"), dtype=np.uint8)
        row[: len(letters)] = table[letters]
    return ids


class TargetEncoder(nn.Module):
    """Residual convolutions over residues, pooled by attention with a few learned queries."""

    def __init__(self, config: EncoderConfig, width: int) -> None:
        super().__init__()
        channels = config.width
        self.embedding = nn.Embedding(len(LETTERS) + 2, channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(config.layers))
        self.convolutions = nn.ModuleList(
            nn.Conv1d(channels, channels, WINDOW, padding=WINDOW // 2) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(channels)
        # A bias would change no softmax.
        self.scores = nn.Linear(channels, QUERIES, bias=False)
        self.out = nn.Linear(QUERIES * channels, width)

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors [targets, d] of ids [targets, T]."""
        inside = ids != PADDING
        # Of a sequence that is empty, its first position stands for it: no mean is over nothing.
        inside = inside | F.one_hot(torch.zeros_like(ids[:, 0]), ids.shape[1]).bool()
        hidden = self.embedding(ids) * inside[..., None]
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            mixed = convolution(rearrange(norm(hidden) * inside[..., None], "n t c -> n c t"))
            hidden = hidden + F.gelu(rearrange(mixed, "n c t -> n t c")) * inside[..., None]
        hidden = self.norm(hidden)
        scores = self.scores(hidden)
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        shares = wide.masked_fill(~inside[..., None], -torch.inf).softmax(dim=1)
        pooled = torch.einsum("ntq,ntc->nqc", shares.to(hidden.dtype), hidden)
        return self.out(rearrange(pooled, "n q c -> n (q c)"))
