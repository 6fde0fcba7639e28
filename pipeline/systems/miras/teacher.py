"""The teacher of a memory: the same frozen backbone, with full attention and without the memory.

Self-distillation to a model's own full attention is that of AHN (arXiv 2510.07318). There is no second copy of the
weights: the backbone's modules run once more, without a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.lm.attention import AttentionCall, Beside
from pipeline.lm.backbone import unrotated
from pipeline.lm.loss_head import LossHead
from pipeline.systems.miras.config import DistillationConfig, MirasConfig


def check_distillation(sizes: MirasConfig, sequence_length: int, trained: int | None) -> None:
    """Raises UserError where a teacher would have nothing to say: no token of a sequence sees more than the window, as
    far as the backbone was trained."""
    if sizes.distil != "full":
        return
    seen = sequence_length if trained is None else min(sequence_length, trained)
    if sizes.attention.window < seen:
        return
    limit = f"--sequence-length {sequence_length}"
    if seen < sequence_length:
        limit = f"the {seen} tokens that the backbone was trained at"
    raise UserError(
        f"--model.distil full: --model.attention.window {sizes.attention.window} holds all of {limit}, so that the"
        f" teacher sees nothing beyond it: give a window below {seen}"
    )


KL, HIDDEN = "kl", "hidden"
"""Loss terms: the divergence of the logits in nats, and the relative squared error of hidden states."""


class Teacher:
    """One step's teacher: `run` asks it, `compare` and `distilled` hold the student against what it said."""

    def __init__(self, config: DistillationConfig, layers: Sequence[int], places: tuple[Tensor, Tensor]) -> None:
        """`layers`: those with a memory. `places`: of the compared tokens, as `pipeline.lm.distillation.places`."""
        self.config, self.layers = config, layers
        self.index, self.counted = places
        self._states: dict[int, Tensor] = {}
        self._last: Tensor | None = None
        self._errors: list[Tensor] = []

    @property
    def first(self) -> int:
        """The first layer with a memory: below it, student and teacher are the same modules."""
        return min(self.layers)

    @torch.no_grad()
    def run(self, backbone: Any, hidden: Tensor, call: AttentionCall, first: int) -> None:
        """The layers from `first` on, of hidden [batch, sequence / degree, width]; keeps what is compared alone."""
        rotation = unrotated(hidden)
        for index, layer in enumerate(backbone.model.layers[first:], start=first):
            hidden = layer(hidden, position_embeddings=rotation, attention_call=call, beside=Beside())
            if self.config.hidden and index in self.layers:
                self._states[index] = self._at(hidden)
        self._last = backbone.model.norm(self._at(hidden))

    def compare(self, layer: int, hidden: Tensor) -> None:
        """The student's hidden states after a layer, [batch, sequence / degree, width]."""
        if layer not in self._states:
            return
        expected = self._states.pop(layer)
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        error = (self._at(hidden).to(precise) - expected.to(precise)).square().sum(-1)
        size = expected.to(precise).square().sum(-1)
        self._errors.append(error / size.clamp_min(torch.finfo(precise).tiny))

    def distilled(self, head: LossHead, hidden: Tensor) -> dict[str, Tensor]:
        """Sums over the compared tokens, by loss term, of the student's hidden states after the last norm."""
        assert self._last is not None
        found = {}
        if self.config.kl:
            found[KL] = self._sum(head(self._at(hidden), teacher=self._last))
        if self.config.hidden:
            found[HIDDEN] = self._sum(torch.stack(self._errors).mean(0))
        return found

    def _at(self, hidden: Tensor) -> Tensor:
        """The compared tokens, [n, width]."""
        return hidden.flatten(0, 1)[self.index]

    def _sum(self, values: Tensor) -> Tensor:
        return torch.where(self.counted, values, 0).sum()
