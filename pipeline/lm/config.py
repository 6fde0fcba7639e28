"""Sections of the config that language-model systems share: the backbone and its attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from pipeline.errors import UserError
from pipeline.model_config import MAY_CHANGE, at_least

ModelType: TypeAlias = Literal["llama", "mistral", "olmo", "olmo2", "qwen2", "qwen3"]
"""Model types of transformers that a backbone may have; SmolLM2 is a llama."""
AttentionBackend: TypeAlias = Literal["auto", "sdpa", "flex", "flash2", "flash3", "flash4"]
"""What computes attention (`pipeline.ops.attention`)."""

SMOLLM2 = "outputs/smollm2"
"""Where `fetch smollm2` puts the model, and the recipe that is made for it looks for it."""
FETCH_SMOLLM2 = "python -m pipeline fetch smollm2"
"""The command that does."""


@dataclass(frozen=True)
class BackboneConfig:
    """The decoder of the model, as transformers builds it."""

    pretrained: str | None = None
    """Local folder, GGUF file or hub name of the weights (allenai/OLMo-2-0425-1B), whose own config holds; None: random
    weights of the model type and sizes below."""
    revision: str = "main"
    """Revision of a hub name."""
    trainable: bool = False
    """Train the backbone too, not the memory alone."""
    lr_scale: float = field(default=1.0, metadata=MAY_CHANGE)
    """Learning rate of a trainable backbone, as a multiple of --lr."""
    model_type: ModelType = "olmo2"
    """Model type of transformers of random weights."""
    tied: bool = False
    """Random weights alone: the output embedding is the input embedding."""
    clip_qkv: float | None = None
    """Random weights of the type olmo alone: queries, keys and values are clipped to this size; None: they are not."""
    layers: int = 16
    """Decoder layers."""
    width: int = 2048
    """Hidden size."""
    heads: int = 16
    """Attention heads; the head size is width / heads."""
    kv_heads: int = 16
    """Key-value heads."""
    ffn: int = 8192
    """Width of the feed-forward layers."""
    vocabulary: int = 100352
    """Token ids."""
    rope_theta: float = 500000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Epsilon of the RMS norms; the norms of the type olmo have 1e-5 and no weights."""
    initializer_range: float = 0.02
    """Standard deviation of random matrices."""

    def __post_init__(self) -> None:
        at_least(1, self, "backbone", "layers", "width", "heads", "kv_heads", "ffn", "vocabulary")
        if self.clip_qkv is not None and self.model_type != "olmo":
            raise UserError(
                f"--model.backbone.clip-qkv {self.clip_qkv}: {self.model_type} has no clipping: leave it out, or give"
                " --model.backbone.model-type olmo"
            )
        if self.clip_qkv is not None and not 0 < self.clip_qkv < math.inf:
            raise UserError(f"--model.backbone.clip-qkv {self.clip_qkv}: give a value above 0, or none")
        if self.width % self.heads:
            raise UserError(
                f"--model.backbone.width {self.width} is not divisible by --model.backbone.heads {self.heads}"
            )
        if self.heads % self.kv_heads:
            raise UserError(
                f"--model.backbone.heads {self.heads} is not divisible by --model.backbone.kv-heads {self.kv_heads}"
            )


@dataclass(frozen=True)
class AttentionConfig:
    """What attention sees; beyond it, the memory is the only way back."""

    kind: Literal["window", "full"] = "window"
    """window: the last `window` tokens of the document, across steps; full: the document's tokens in this sequence."""
    window: int = 4096
    """Tokens that a windowed query sees, itself included."""
    sinks: int = 4
    """First tokens of a document that every windowed query sees as well (attention sinks)."""
    backend: AttentionBackend = field(default="auto", metadata=MAY_CHANGE)
    """What computes it; auto takes the fastest that fits."""

    def __post_init__(self) -> None:
        at_least(1, self, "attention", "window")
        at_least(0, self, "attention", "sinks")
