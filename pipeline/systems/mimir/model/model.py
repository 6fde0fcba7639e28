"""The denoiser as a whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.systems.mimir.config import MimirConfig
from pipeline.systems.mimir.model.blocks import Block
from pipeline.systems.mimir.model.conditions import EncodedTargets, Labels, TargetTable, TimeEmbedding
from pipeline.systems.mimir.model.lengths import EmpiricalLengths, LengthHead
from pipeline.systems.mimir.model.sequences import TargetSequences


class ModelOutput(NamedTuple):
    """logits [rows, L, K]: of the letters that the residues had before the noise. log_lengths [rows, longest + 1]
    float32: log p(length | label, target)."""

    logits: Tensor
    log_lengths: Tensor


class MimirModel(nn.Module):
    """Residues, positions and conditions are added, go through the blocks, a last norm and a head of V outputs, of
    which those of the K letters are used: no padding and no mask is ever predicted."""

    def __init__(self, config: MimirConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        width, self.letters = config.width, len(config.letters)
        self.activation_checkpointing = activation_checkpointing
        self.residues = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_length, width)
        self.time = TimeEmbedding(width)
        self.labels = Labels(width)
        self.targets: TargetTable | EncodedTargets = (
            TargetTable(config.targets, width) if config.target == "table" else EncodedTargets(config)
        )
        self.lengths: EmpiricalLengths | LengthHead = (
            EmpiricalLengths(config.max_length)
            if config.length == "empirical"
            else LengthHead(width, config.min_length, config.max_length)
        )
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.vocab_size)

    def forward(
        self,
        states: Tensor,
        level: Tensor,
        lengths: Tensor,
        labels: Tensor,
        targets: Tensor,
        sequences: TargetSequences | None = None,
    ) -> ModelOutput:
        """One prediction of all residues.

        states [rows, L] int64: noisy residues as a kernel has them (letters 0..K-1, K for a mask), anything beyond the
        length. level [rows]: the time (`Kernel.level`). lengths [rows] int64, 1 or more. labels [rows] int64, -1 where
        it is withheld. targets [rows] int64 for a table, -1 for none; `sequences` in their place for an encoder.
        """
        positions = torch.arange(states.shape[1], device=states.device)
        inside = positions < lengths[:, None]
        given = self.condition(labels, targets, sequences)
        condition = given + self.time(level)
        hidden = self.residues((states + 1) * inside) + self.positions(positions) + condition[:, None]
        visible = inside[:, None, None]
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            hidden = checkpoint(block, hidden, visible, use_reentrant=False) if recompute else block(hidden, visible)
        logits = self.head(self.norm(hidden))[..., 1 : self.letters + 1]
        return ModelOutput(logits, self._log_lengths(labels, given))

    def condition(self, labels: Tensor, targets: Tensor, sequences: TargetSequences | None = None) -> Tensor:
        """The vectors of label and target [rows, d], without the time."""
        if isinstance(self.targets, TargetTable):
            return self.labels(labels) + self.targets(targets)
        if sequences is None:
            raise ValueError("the targets are told by their sequences, and none are given")
        return self.labels(labels) + self.targets(sequences.ids, sequences.rows)

    def log_lengths(self, labels: Tensor, targets: Tensor, sequences: TargetSequences | None = None) -> Tensor:
        """log p(length | label, target), [rows, longest + 1] float32."""
        return self._log_lengths(labels, self.condition(labels, targets, sequences))

    def _log_lengths(self, labels: Tensor, condition: Tensor) -> Tensor:
        return self.lengths(labels) if isinstance(self.lengths, EmpiricalLengths) else self.lengths(condition)


def parameter_parts(config: MimirConfig) -> dict[str, int]:
    """Parameters by what they are for. `denoiser` is that of empirical lengths and a table of targets, in closed form;
    what other choices put in the place of the table, or add, is apart from it."""
    d, layers, vocabulary = config.width, config.layers, config.vocab_size
    table = config.target == "table"
    rows = config.max_length + 10 + 2 * vocabulary + (config.targets if table else -1)
    parts = {"denoiser": (12 * layers + 8) * d**2 + (13 * layers + rows) * d + vocabulary}
    with torch.device("meta"):
        model = MimirModel(config)
    if not table:
        parts["target encoder"] = sum(parameter.numel() for parameter in model.targets.parameters())
    if config.length == "head":
        parts["length head"] = sum(parameter.numel() for parameter in model.lengths.parameters())
    return parts
