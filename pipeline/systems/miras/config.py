"""Sizes and choices of the miras system."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import tyro

from pipeline.config import ModelConfig
from pipeline.data.synthetic import RecallConfig
from pipeline.errors import UserError
from pipeline.systems.miras.limits import MAX_MOMENTUM


@dataclass(frozen=True)
class BackboneConfig:
    """The `Olmo2ForCausalLM` under the memory."""

    pretrained: str | None = None
    """Local folder or hub name of OLMo2 weights (allenai/OLMo-2-0425-1B); None: random weights of the sizes below."""
    revision: str = "main"
    """Revision of a hub name."""
    trainable: bool = False
    """Train the backbone too, not the memory alone."""
    lr_scale: float = 1.0
    """Learning rate of a trainable backbone, as a multiple of --lr."""
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
    """Epsilon of the RMS norms."""
    initializer_range: float = 0.02
    """Standard deviation of random matrices."""

    def __post_init__(self) -> None:
        _at_least(1, self, "backbone", "layers", "width", "heads", "kv_heads", "ffn", "vocabulary")
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
    backend: Literal["auto", "sdpa", "flex", "flash2", "flash3", "flash4"] = "auto"
    """What computes it; auto takes the fastest that fits."""

    def __post_init__(self) -> None:
        _at_least(1, self, "attention", "window")
        _at_least(0, self, "attention", "sinks")


@dataclass(frozen=True)
class MemoryConfig:
    """The memory branch on each chosen layer."""

    layers: tuple[int, ...] = (8, 10, 12, 14)
    """Layers that get a memory, counted from 0."""
    rule: Literal["titans", "delta"] = "titans"
    """titans: momentum and forgetting; delta: no momentum."""
    backend: Literal["auto", "torch"] = "auto"
    """Backend of the memory scan."""
    heads: int = 16
    """Memories per layer."""
    head_dim: int = 128
    """Size of a key, and of a value: each memory is head_dim x head_dim."""
    chunk: int = 64
    """Tokens that one step of the scan takes at a time; the result does not depend on it."""
    conv: int = 4
    """Width of the causal depthwise convolution on queries, keys and values."""
    persistent: int = 16
    """Learned key-value pairs per head that are read beside the memory and never written."""
    gate_rank: int = 64
    """Rank of the output gate."""
    momentum: float = 0.1
    """Initial momentum of every head."""
    step_size: tuple[float, float] = (0.5, 0.002)
    """Initial step sizes of the first and the last head; the others lie between on a log scale."""
    half_life: tuple[float, float] = (1e3, 1e6)
    """Initial forget half-lives in tokens of the first and the last head."""

    def __post_init__(self) -> None:
        _at_least(1, self, "memory", "heads", "head_dim", "chunk", "gate_rank")
        _at_least(2, self, "memory", "conv")
        _at_least(0, self, "memory", "persistent")
        if not 0 < self.momentum < MAX_MOMENTUM:
            raise UserError(f"--model.memory.momentum {self.momentum}: give a value between 0 and {MAX_MOMENTUM}")
        for flag, values in (("step-size", self.step_size), ("half-life", self.half_life)):
            if not min(values) > 0:
                raise UserError(f"--model.memory.{flag} {' '.join(map(str, values))}: give two values above 0")
        if len(set(self.layers)) < len(self.layers):
            raise UserError(f"--model.memory.layers {' '.join(map(str, self.layers))}: name each layer once")


@dataclass(frozen=True)
class MirasConfig(ModelConfig):
    """OLMo2 with a neural long-term memory."""

    system: tyro.conf.Suppress[str] = "miras"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    recall: RecallConfig | None = None
    """The synthetic recall task in place of documents."""

    def __post_init__(self) -> None:
        if not self.memory.layers:
            return
        if min(self.memory.layers) < 0 or (
            self.backbone.pretrained is None and max(self.memory.layers) >= self.backbone.layers
        ):
            raise UserError(
                f"--model.memory.layers {' '.join(map(str, self.memory.layers))}: the backbone has layers 0 to"
                f" {self.backbone.layers - 1}"
            )


def _at_least(least: int, section: object, name: str, *fields: str) -> None:
    for key in fields:
        if getattr(section, key) < least:
            flag = f"--model.{name}.{key.replace('_', '-')}"
            raise UserError(f"{flag} is {getattr(section, key)}: give {least} or more")
