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
from pipeline.lm.backbone import UNROTATED
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
        limit = f"the {seen} tokens that the backbone sees, or was trained at"
    raise UserError(
        f"--model.distil full: --model.attention.window {sizes.attention.window} holds all of {limit}, so that the"
        f" teacher sees nothing beyond it: give a window below {seen}"
    )


KL, HIDDEN, ATTENTION = "kl", "hidden", "attention"
"""Loss terms: the divergence of the logits in nats, and the relative squared errors of hidden states and of attention's
output."""


def term_weights(config: DistillationConfig) -> dict[str, float]:
    """By loss term, of those that have a weight."""
    weights = {KL: config.kl, HIDDEN: config.hidden, ATTENTION: config.attention}
    return {term: weight for term, weight in weights.items() if weight}


class Teacher:
    """One step's teacher: `run` asks it, `compare` and `distilled` hold the student against what it said."""

    def __init__(self, config: DistillationConfig, layers: Sequence[int], places: tuple[Tensor, Tensor]) -> None:
        """`layers`: those with a memory. `places`: of the compared tokens, as `pipeline.lm.distillation.places`."""
        self.config, self.layers = config, layers
        self.index, self.counted = places
        self._said: dict[int, dict[str, Tensor]] = {}
        self._last: Tensor | None = None
        self._errors: dict[str, list[Tensor]] = {}

    @property
    def first(self) -> int:
        """The first layer with a memory: below it, student and teacher are the same modules."""
        return min(self.layers)

    @property
    def kept(self) -> Sequence[int]:
        """The layers whose output of attention is compared."""
        return self.layers if self.config.attention else ()

    @torch.no_grad()
    def run(self, backbone: Any, hidden: Tensor, call: AttentionCall, first: int) -> None:
        """The layers from `first` on, of hidden [batch, sequence / degree, width]; keeps what is compared alone."""
        layers = backbone.model.layers if self.config.kl else backbone.model.layers[: max(self.layers) + 1]
        for index, layer in enumerate(layers[first:], start=first):
            hidden = layer(hidden, position_embeddings=UNROTATED, attention_call=call, beside=Beside())
            self._said[index] = self._seen(index, hidden, call)
        if self.config.kl:
            self._last = backbone.model.norm(self._at(hidden))

    def compare(self, layer: int, hidden: Tensor, call: AttentionCall) -> None:
        """The student after a layer: its hidden states, [batch, sequence / degree, width], and its attention."""
        for term, found in self._seen(layer, hidden, call).items():
            expected = self._said[layer].pop(term)
            self._errors.setdefault(term, []).append(relative_error(found, expected))

    def distilled(self, head: LossHead, hidden: Tensor) -> dict[str, Tensor]:
        """Sums over the compared tokens, by loss term, of the student's hidden states after the last norm."""
        found = {term: torch.stack(errors).mean(0) for term, errors in self._errors.items()}
        if self._last is not None:
            found[KL] = head(self._at(hidden), teacher=self._last)
        return {term: torch.where(self.counted, values, 0).sum() for term, values in found.items()}

    def _seen(self, layer: int, hidden: Tensor, call: AttentionCall) -> dict[str, Tensor]:
        """What is compared after a layer, by loss term, [n, width] each."""
        found = {}
        if self.config.hidden and layer in self.layers:
            found[HIDDEN] = self._at(hidden)
        if layer in call.keep:
            found[ATTENTION] = self._at(call.kept.pop(layer).flatten(2))
        return found

    def _at(self, hidden: Tensor) -> Tensor:
        """The compared tokens, [n, width]."""
        return hidden.flatten(0, 1)[self.index]


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """|found - expected|^2 / |expected|^2 of each row [n, width], in float32 or wider: [n]."""
    precise = torch.float64 if found.dtype == torch.float64 else torch.float32
    size = expected.to(precise).square().sum(-1).clamp_min(torch.finfo(precise).tiny)
    return (found.to(precise) - expected.to(precise)).square().sum(-1) / size
