"""How long a peptide is, given label and target: as often as in the training data, or as a head predicts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EmpiricalLengths(nn.Module):
    """The lengths of the training data by label. They are a buffer, which checkpoints hold, and no parameter."""

    counts: Tensor
    """[2, longest + 1] int64: peptides of each label by length. A dtype that no precision of a run converts."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2, longest + 1, dtype=torch.int64))

    def forward(self, labels: Tensor) -> Tensor:
        """log p(length | label), [rows, longest + 1] float32, -inf for a length that never occurs; where the label is
        withheld, or training has no peptide of it, over those of both."""
        both = self.counts.sum(0, keepdim=True)
        counts = torch.cat([torch.where(self.counts.any(-1, keepdim=True), self.counts, both), both]).double()
        # Before the data is read nothing is known: all lengths are then as likely.
        known = counts.any(-1, keepdim=True)
        shares = torch.where(known, counts / counts.sum(-1, keepdim=True).clamp(min=1), 1 / counts.shape[-1])
        return shares.log().float()[torch.where(labels < 0, 2, labels)]


class LengthHead(nn.Module):
    """A categorical distribution of the length from the vectors of label and target: d^2 + 3 d + (d + 1) m parameters
    for m possible lengths."""

    def __init__(self, width: int, shortest: int, longest: int) -> None:
        super().__init__()
        self.shortest = shortest
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.out = nn.Linear(width, longest - shortest + 1)

    def forward(self, condition: Tensor) -> Tensor:
        """log p(length | condition), [rows, longest + 1], -inf below the shortest; condition [rows, d]. In float32, or
        float64 where the condition is."""
        logits = self.out(F.gelu(self.inner(self.norm(condition))))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.pad(wide.log_softmax(-1), (self.shortest, 0), value=-torch.inf)
