"""The model: F of a context and a token, and the head on the token's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.ops.cross_entropy import linear_argmax, linear_cross_entropy
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.model.blocks import Blocks
from pipeline.systems.cvfp.solve.sweeps import solver
from pipeline.systems.cvfp.solve.transition import Solved, Solver

IGNORED = -100


@dataclass(frozen=True)
class CvfpOutput:
    """What a call of the model was asked for; None where it was not."""

    contexts: Tensor | None = None
    """[rows, L, D]."""
    states: Tensor | None = None
    """Token states u_t [rows, L, D]."""
    embedded: Tensor | None = None
    """Normed embeddings e_t [rows, L, D]."""
    losses: Tensor | None = None
    """Nats of each label [rows, L] float32; 0 where it is ignored."""
    predictions: Tensor | None = None
    """The likeliest next token [rows, L]."""
    solved: Solved | None = None
    """What the contexts of a recurrence took."""


class Statistics(nn.Module):
    """Moving averages of the contexts' second moments E[c c^T] [D, D], float32 whatever the model computes in."""

    moments: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        # Whatever dtype was asked for, ZeRO-3 makes what is built under it in the model's.
        self.register_buffer("moments", torch.zeros(width, width).float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Statistics:
        for name, buffer in self.named_buffers(recurse=False):
            moved = fn(buffer)
            # A change of the model's precision is none of theirs.
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self


class Head(nn.Linear):
    """From token states to next tokens; the logits of all tokens never exist at a time."""

    def forward(self, states: Tensor, labels: Tensor | None = None, *, predict: bool = False) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Losses [tokens] of labels [tokens], and with `predict` the likeliest ids [tokens], of states [tokens, D]."""
        found = []
        if labels is not None:
            found.append(linear_cross_entropy(states, self.weight, labels, IGNORED, bias=self.bias))
        if predict:
            found.append(linear_argmax(states, self.weight, self.bias))
        return tuple(found)


class CvfpModel(nn.Module):
    """Whatever reads weights goes through a call of it, since ZeRO-3 gathers them for calls."""

    def __init__(self, sizes: CvfpConfig) -> None:
        super().__init__()
        width, decay = sizes.width, 1.0 if sizes.as_published else sizes.decay
        self.embedding = nn.Embedding(sizes.vocab, width)
        self.norm_embed = nn.LayerNorm(width)
        self.blocks = Blocks(sizes.layers, width, decay, sizes.layernorm_mix)
        self.solver = solver(sizes.solve)
        self.head = Head(width, sizes.vocab)
        self.statistics = Statistics(width)

    def forward(
        self,
        ids: Tensor | None = None,
        contexts_in: Tensor | None = None,
        *,
        start: Tensor | None = None,
        mask: Tensor | None = None,
        solve: Solver | None = None,
        initial: Tensor | None = None,
        states: Tensor | None = None,
        labels: Tensor | None = None,
        predict: bool = False,
        contexts_alone: bool = False,
    ) -> CvfpOutput:
        """One application of the blocks to the tokens ids [rows, L], with the context of each [rows, L, D].

        `start` [rows, D] in place of contexts: the contexts of the recurrence that begins so, without gradient, by
        `solve`, or the way of --model.solve; mask [rows, L] (None: every token) and initial [rows, L, D] are the
        solver's. `states` [rows, L, D] in place of tokens: the head alone. Without any context: the embeddings alone.
        With labels [rows, L] their losses, with `predict` the likeliest next tokens. `contexts_alone`: no token states.
        """
        dtype = self.head.weight.dtype
        contexts = embedded = solved = None
        if states is None:
            assert ids is not None
            embedded = self.norm_embed(self.embedding(ids))
            if start is not None:
                way = self.solver if solve is None else solve
                solved = self.blocks(start.to(dtype), embedded, solve=way, mask=mask, initial=initial)
                contexts = solved.contexts
            elif contexts_in is not None:
                contexts, states = self.blocks(contexts_in.to(dtype), embedded, contexts_alone=contexts_alone)
        losses = predictions = None
        if labels is not None or predict:
            assert states is not None
            flat = states.to(dtype).flatten(0, 1)
            found = list(self.head(flat, None if labels is None else labels.flatten(), predict=predict))
            shape = states.shape[:2]
            losses = found.pop(0).view(shape) if labels is not None else None
            predictions = found.pop(0).view(shape) if predict else None
        return CvfpOutput(contexts, states, embedded, losses, predictions, solved)


def parameter_parts(sizes: CvfpConfig) -> Mapping[str, int]:
    """Parameters by the part that they are of."""
    width = sizes.width
    return {
        "embedding": sizes.vocab * width,
        "embedding norm": 2 * width,
        "blocks": sizes.layers * (4 * width**2 + 2 * width + 4 * width),
        "head": sizes.vocab * (width + 1),
    }
