"""Sizes and choices of the miras system."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import tyro

from pipeline.config import MAY_CHANGE, ModelConfig, at_least
from pipeline.errors import UserError
from pipeline.lm.config import AttentionConfig, BackboneConfig
from pipeline.ops.gates import MAX_MOMENTUM, STRETCH
from pipeline.systems.miras.rule_config import MemoraConfig, MlpConfig, MonetaConfig, SwigluConfig, YaadConfig

Rule = Literal["titans", "delta", "moneta", "yaad", "memora", "mlp", "swiglu"]


@dataclass(frozen=True)
class MemoryConfig:
    """The memory branch on each chosen layer."""

    layers: tuple[int, ...] = (8, 10, 12, 14)
    """Layers that get a memory, counted from 0."""
    rule: Rule = "titans"
    """titans: momentum and forgetting; delta: no momentum. These are exact. The others take their gradients at the
    start of a chunk (docs/memory_family.md): moneta: p-norm bias, q-norm retention; yaad: Huber bias; memora: softmax
    retention; mlp: a two-layer memory; swiglu: a SwiGLU memory in large chunks."""
    backend: Literal["auto", "torch", "cpu", "cuda"] = field(default="auto", metadata=MAY_CHANGE)
    """Backend of the memory scan; auto takes the fastest that fits. cpu and cuda: native, titans and delta alone."""
    attachment: Literal["residual", "mac", "mag", "mal"] = "residual"
    """How the memory meets its layer. residual: beside it; mac: read as context of its attention, written with what
    attention gave; mag: gates the attention's output; mal: before it (Titans, arXiv 2501.00663, section 4)."""
    context: int = 512
    """Tokens of a segment of mac: attention reads the memory as it was before the segment (docs/attachments.md)."""
    heads: int = 16
    """Memories per layer."""
    head_dim: int = 128
    """Size of a key, and of a value: each memory is head_dim x head_dim."""
    chunk: int = field(default=64, metadata=MAY_CHANGE)
    """Tokens that one step of the scan of titans and delta takes at a time; the result does not depend on it."""
    gradient_chunk: int = 16
    """Tokens whose gradients moneta, yaad, memora and mlp take at the memory that the first of them finds. It is part
    of the result: a smaller one corrects itself sooner and runs slower. 16 to 64 is usual."""
    conv: int = 4
    """Width of the causal depthwise convolution on queries, keys and values."""
    persistent: int = 16
    """Learned key-value pairs per head that are read beside the memory and never written."""
    write_gate: Literal["sigmoid", "hard"] = "sigmoid"
    """Of the step sizes. sigmoid: above 0 for every token; hard: a stretched sigmoid, cut at 0 and 1, so that a token
    can write nothing. What is stored then outlasts any number of such tokens (docs/long_recall.md)."""
    gate_rank: int = 64
    """Rank of the output gate."""
    momentum: float = 0.1
    """Initial momentum of every head, where the rule has one."""
    step_size: tuple[float, float] = (0.5, 0.002)
    """Initial step sizes of the first and the last head; the others lie between on a log scale. Rules with another
    range of step sizes scale them by it."""
    half_life: tuple[float, float] = (1e3, 1e6)
    """Initial forget half-lives in tokens of the first and the last head."""
    moneta: MonetaConfig = field(default_factory=MonetaConfig)
    yaad: YaadConfig = field(default_factory=YaadConfig)
    memora: MemoraConfig = field(default_factory=MemoraConfig)
    mlp: MlpConfig = field(default_factory=MlpConfig)
    swiglu: SwigluConfig = field(default_factory=SwigluConfig)

    @property
    def has_momentum(self) -> bool:
        """Whether the rule carries a momentum, one learned number per head."""
        if self.rule in ("titans", "delta"):
            return self.rule == "titans"
        return bool(getattr(self, self.rule).momentum)

    @property
    def stretch(self) -> float:
        """How far the sigmoid of the step sizes is stretched (`pipeline.ops.gates.bounded_gates`)."""
        return STRETCH if self.write_gate == "hard" else 0.0

    @property
    def hidden(self) -> int:
        """Hidden units of a deep memory; 0 for a matrix."""
        return self.head_dim * getattr(self, self.rule).hidden if self.rule in ("mlp", "swiglu") else 0

    @property
    def state_rows(self) -> int:
        """Rows of each part of a memory's state, whose columns are head_dim."""
        return {"mlp": 2 * self.hidden, "swiglu": 3 * self.hidden}.get(self.rule, self.head_dim)

    @property
    def chunk_start(self) -> int | None:
        """Tokens of a chunk whose gradients are taken at its start; None for the exact rules."""
        if self.rule in ("titans", "delta"):
            return None
        return self.swiglu.gradient_chunk if self.rule == "swiglu" else self.gradient_chunk

    @property
    def ignored_fields(self) -> set[str]:
        """Fields that this rule and attachment do not use: two runs that differ in them alone train the same model."""
        unused = {"moneta", "yaad", "memora", "mlp", "swiglu"} - {self.rule}
        if self.rule in ("titans", "delta", "swiglu"):
            unused.add("gradient_chunk")
        if self.attachment != "mac":
            unused.add("context")
        return unused

    def __post_init__(self) -> None:
        at_least(1, self, "memory", "heads", "head_dim", "chunk", "gradient_chunk", "gate_rank", "context")
        at_least(2, self, "memory", "conv")
        at_least(0, self, "memory", "persistent")
        if not 0 < self.momentum < MAX_MOMENTUM:
            raise UserError(f"--model.memory.momentum {self.momentum}: give a value between 0 and {MAX_MOMENTUM}")
        for flag, values in (("step-size", self.step_size), ("half-life", self.half_life)):
            if not min(values) > 0:
                raise UserError(f"--model.memory.{flag} {' '.join(map(str, values))}: give two values above 0")
        if len(set(self.layers)) < len(self.layers):
            raise UserError(f"--model.memory.layers {' '.join(map(str, self.layers))}: name each layer once")
        if self.backend in ("cpu", "cuda") and self.chunk_start is not None:
            raise UserError(
                f"--model.memory.backend {self.backend}: the rule {self.rule} has no native kernel; give auto or torch"
            )


@dataclass(frozen=True)
class MirasConfig(ModelConfig):
    """A decoder (OLMo2 by default) with a neural long-term memory."""

    common: ClassVar[tuple[str, ...]] = (
        "backbone.pretrained",
        "backbone.trainable",
        "attention.kind",
        "attention.window",
        "memory.layers",
        "memory.rule",
        "memory.attachment",
    )
    system: tyro.conf.Suppress[str] = "miras"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)

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
