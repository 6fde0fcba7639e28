"""Small networks that say how much, how sharply and where a memory writes at the end of a span.

One for each instance of a memory (a layer of a column, or a column); all instances are one batched product. Source: the
prototype's neuromodulators (learned plasticity as in arXiv 1804.02464 and 2002.10585), calibrated: at initialisation
the outputs are those of CALIBRATION, up to what small random weights add.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.systems.neuromorphic.columns import ColumnLinear

PROJECTED, HIDDEN, SCALARS = 8, 32, 3
HEAD_STD = 0.005
"""Of the initial weights of the heads: small, so that the biases say what comes out, and not 0, so that gradients reach
the layers below from the first step."""
P, G, TAU = 0.5, 0.5, 1.0
EPISODIC_G, WW, EPISODIC_DECAY = 0.3, 0.5, 0.999
LAMBDA_RANGE, TAU_RANGE = (0.999, 1.0), (0.05, 5.0)
G_RANGE, WW_RANGE, DECAY_RANGE = (0.001, 0.95), (0.0, 2.0), (0.99, 0.9999)
SURPRISE_SHARE = 0.95
"""w of novelty at initialisation. A token that was predicted is no episode, however new its key: at .5 the keys of
predictable tokens, which always differ a little, fill the memory and outvote what was told."""
LAMBDA_BIAS = -4.0
"""lambda is at the lower end of its range at first; a sigmoid reaches that only at minus infinity."""


class ProceduralControls(NamedTuple):
    """Each [I, N], `routing` [I, N, r]; of I instances."""

    commitment: Tensor
    """p, 0 to 1: how much of what is eligible is committed."""
    retention: Tensor
    """lambda, .999 to 1: what commitment leaves of the strengths."""
    gain: Tensor
    """g, 0 to 1."""
    routing: Tensor
    """l: added to the logits of the slots."""
    temperature: Tensor
    """tau, .05 to 5, of the softmax over slots."""


class EpisodicControls(NamedTuple):
    """Each [I, N]."""

    gain: Tensor
    """g, .001 to .95."""
    temperature: Tensor
    """tau, .05 to 5."""
    aversion: Tensor
    """ww, 0 to 2: what a slot's strength takes from its score."""
    decay: Tensor
    """.99 to .9999 per span, of the strengths."""


class Neuromodulator(nn.Module):
    """[three scalars ; Linear_8(mean key)] -> Linear 32 -> ReLU -> one linear head per output."""

    def __init__(self, instances: int, features: int, outputs: int) -> None:
        super().__init__()
        self.projection = ColumnLinear(instances, features, PROJECTED)
        self.inner = ColumnLinear(instances, SCALARS + PROJECTED, HIDDEN)
        self.heads = ColumnLinear(instances, HIDDEN, outputs)

    def forward(self, scalars: Tensor, mean_key: Tensor) -> Tensor:
        """scalars [I, N, 3] and mean_key [I, N, features], in any dtype -> raw outputs [I, N, outputs] in theirs."""
        kept = torch.promote_types(scalars.dtype, torch.float32)
        weights = self.heads.weight.dtype
        projected = self.projection(mean_key.to(weights))
        hidden = F.relu(self.inner(torch.cat([scalars.to(weights), projected], -1)))
        return self.heads(hidden).to(kept)


class ProceduralNeuromodulator(Neuromodulator):
    """Scalars: mean eligibility norm, sum of strengths / budget, surprise of the span (nats)."""

    def __init__(self, instances: int, features: int, slots: int) -> None:
        super().__init__(instances, features, 4 + slots)

    def controls(self, scalars: Tensor, mean_key: Tensor) -> ProceduralControls:
        """scalars [I, N, 3], mean_key [I, N, features]: the mean over slots of what is eligible."""
        raw = self(scalars, mean_key)
        return ProceduralControls(
            commitment=torch.sigmoid(raw[..., 0]),
            retention=_within(raw[..., 1], LAMBDA_RANGE),
            gain=torch.sigmoid(raw[..., 2]),
            routing=raw[..., 4:],
            temperature=_within(raw[..., 3], TAU_RANGE),
        )


class EpisodicNeuromodulator(Neuromodulator):
    """Scalars: surprise of the span (nats), sum of strengths / budget, mean novelty of the candidates' span."""

    def __init__(self, instances: int, features: int) -> None:
        super().__init__(instances, features, 4)

    def controls(self, scalars: Tensor, mean_key: Tensor) -> EpisodicControls:
        """scalars [I, N, 3], mean_key [I, N, features]: the mean key of the span's tokens."""
        raw = self(scalars, mean_key)
        return EpisodicControls(
            gain=_within(raw[..., 0], G_RANGE),
            temperature=_within(raw[..., 1], TAU_RANGE),
            aversion=_within(raw[..., 2], WW_RANGE),
            decay=_within(raw[..., 3], DECAY_RANGE),
        )


def initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
    """Of a calibrated parameter of the memories inside the whole model, by its name; None for any other parameter.

    The model's initialisation asks here before its own rule, so that it does not overwrite the calibration.
    """
    if name.endswith("neuromodulator.heads.weight"):
        return torch.randn(shape, generator=generator) * HEAD_STD
    if name.endswith("procedural.neuromodulator.heads.bias"):
        bias = torch.zeros(shape)
        bias[..., :4] = torch.tensor([_logit(P), LAMBDA_BIAS, _logit(G), _bias(TAU, TAU_RANGE)])
        return bias
    if name.endswith("episodic.neuromodulator.heads.bias"):
        wanted = [(EPISODIC_G, G_RANGE), (TAU, TAU_RANGE), (WW, WW_RANGE), (EPISODIC_DECAY, DECAY_RANGE)]
        return torch.tensor([_bias(value, limits) for value, limits in wanted]).expand(shape).clone()
    if name.endswith("episodic.novelty.bias"):
        return torch.full(shape, _logit(SURPRISE_SHARE))
    return None


def _within(raw: Tensor, limits: tuple[float, float]) -> Tensor:
    low, high = limits
    return low + (high - low) * torch.sigmoid(raw)


def _bias(value: float, limits: tuple[float, float]) -> float:
    low, high = limits
    return _logit((value - low) / (high - low))


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
