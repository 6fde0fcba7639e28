"""Sizes and choices of the olmo system."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipeline.errors import UserError
from pipeline.lm.config import AttentionBackend, BackboneConfig
from pipeline.model_config import MAY_CHANGE, ModelConfig, Suppress

CUTOFF = 3.0
"""Standard deviations beyond which no random weight lies."""


@dataclass(frozen=True)
class OlmoAttentionConfig:
    """Causal attention over the whole sequence, or within documents with --data.document-mask."""

    backend: AttentionBackend = field(default="auto", metadata=MAY_CHANGE)
    """What computes it; auto takes the fastest that fits."""


@dataclass(frozen=True)
class OlmoConfig(ModelConfig):
    """A decoder that is trained from random weights."""

    common: ClassVar[tuple[str, ...]] = (
        "backbone.layers",
        "backbone.width",
        "backbone.heads",
        "backbone.ffn",
        "backbone.tied",
        "initialisation",
        "z_loss",
    )
    system: Suppress[str] = "olmo"
    backbone: BackboneConfig = field(
        default_factory=lambda: BackboneConfig(
            trainable=True, model_type="olmo", tied=True, vocabulary=50304, rope_theta=10_000.0, norm_eps=1e-5
        )
    )
    attention: OlmoAttentionConfig = field(default_factory=OlmoAttentionConfig)
    initialisation: Literal["mitchell", "normal"] = field(default="mitchell", metadata=MAY_CHANGE)
    """Of random weights, each truncated at three standard deviations. mitchell: 1 / sqrt(inputs), less in what is added
    to the hidden states, by depth (OLMo 1); normal: --model.backbone.initializer-range for all (OLMo 2)."""
    decay_norms: bool = field(default=False, metadata=MAY_CHANGE)
    """Whether --weight-decay is also that of norms and biases (OLMo 2)."""
    decay_embeddings: bool = field(default=False, metadata=MAY_CHANGE)
    """Whether --weight-decay is also that of the input embedding, and of an output embedding that is tied to it."""
    z_loss: float = field(default=0.0, metadata=MAY_CHANGE)
    """Weight of the mean over labels of the square of the logits' log-sum-exp; 0: it is left out (OLMo 2: 1e-5)."""

    def __post_init__(self) -> None:
        if not 0 <= self.z_loss < math.inf:
            raise UserError(f"--model.z-loss is {self.z_loss}: give 0 or more")
        if not self.backbone.trainable:
            raise UserError("--model.backbone.no-trainable: nothing is trained: leave it out")
