"""Sizes and choices of the miras system."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipeline.errors import UserError
from pipeline.lm.config import AttentionConfig, BackboneConfig
from pipeline.model_config import MAY_CHANGE, ModelConfig, Suppress, at_least
from pipeline.ops.gates import MAX_MOMENTUM, STRETCH
from pipeline.systems.miras.layer_choice import LAYERS, OVERFLOW, Layers, check_words, chosen_layers
from pipeline.systems.miras.rule_config import (
    MemoraConfig,
    MlpConfig,
    MonetaConfig,
    SlotsConfig,
    SwigluConfig,
    YaadConfig,
)

Attachment = Literal["residual", "mac", "mag", "mal", "overflow", "slots"]
Rule = Literal["titans", "delta", "moneta", "yaad", "memora", "mlp", "swiglu"]

LIKE_ATTENTION = ("overflow", "slots")
"""Attachments whose memories have attention's own heads, and take in what leaves its window."""
OF_RULES = frozenset(
    ("rule", "backend", "chunk", "gradient_chunk", "key_activation", "write_gate", "write_penalty", "momentum",
     "step_size", "half_life", "moneta", "yaad", "memora", "mlp", "swiglu")
)  # fmt: skip
"""Fields of `MemoryConfig` that say what a rule does."""


@dataclass(frozen=True)
class MemoryConfig:
    """The memory branch on each chosen layer."""

    pretrained: str | None = field(default=None, metadata=MAY_CHANGE)
    """Folder of a trained memory, as `export --memory-only` writes it, which the run starts with; its backbone and its
    settings must be the same. None: initial values."""
    layers: Layers = (8, 10, 12, 14)
    """Layers that get a memory, counted from 0; or upperN for the last N, everyN for every Nth."""
    rule: Rule = "titans"
    """titans: momentum and forgetting; delta: no momentum. These are exact. The others take their gradients at the
    start of a chunk (docs/memory_family.md): moneta: p-norm bias, q-norm retention; yaad: Huber bias; memora: softmax
    retention; mlp: a two-layer memory; swiglu: a SwiGLU memory in large chunks."""
    backend: Literal["auto", "torch", "cpu", "cuda"] = field(default="auto", metadata=MAY_CHANGE)
    """Backend of the memory scan; auto takes the fastest that fits. cpu and cuda: native, titans and delta alone."""
    attachment: Attachment = "residual"
    """How the memory meets its layer. residual: beside it; mac: read as context of its attention, written with what
    attention gave; mag: gates the attention's output; mal: before it (Titans, arXiv 2501.00663, section 4). overflow:
    takes in what leaves the attention window, and is read beside it; exactly the backbone within the window. slots:
    keeps the keys and values that leave the window, merges the nearest where they are too many, and lets attention see
    them; likewise, and of no rule."""
    overflow_layers: Layers = ()
    """Those of `layers` that are attached as overflow, whatever `attachment` says of the others."""
    share: float = 0.05
    """Initial share of the memory in what attention gives, of overflow, once something has left the window."""
    context: int = 512
    """Tokens of a segment of mac: attention reads the memory as it was before the segment (docs/attachments.md)."""
    heads: int = 16
    """Memories per layer; overflow and slots have those of attention, and do not ask."""
    head_dim: int = 128
    """Size of a key, and of a value: each memory is head_dim x head_dim. overflow and slots take that of attention."""
    chunk: int = field(default=64, metadata=MAY_CHANGE)
    """Tokens that one step of the scan of titans and delta takes at a time; the result does not depend on it."""
    gradient_chunk: int = 16
    """Tokens whose gradients moneta, yaad, memora and mlp take at the memory that the first of them finds. It is part
    of the result: a smaller one corrects itself sooner and runs slower. 16 to 64 is usual."""
    key_activation: Literal["silu", "none"] = "silu"
    """Of queries and keys before they are made of unit length. silu: all but non-negative, so that no two keys are
    opposite; none: as they are."""
    conv: int = 4
    """Width of the causal depthwise convolution on queries, keys and values."""
    persistent: int = 16
    """Learned key-value pairs per head that are read beside the memory and never written."""
    write_gate: Literal["sigmoid", "hard"] = "sigmoid"
    """Of the step sizes. sigmoid: above 0 for every token; hard: a stretched sigmoid, cut at 0 and 1, so that a token
    can write nothing. What is stored then outlasts any number of such tokens (docs/long_recall.md)."""
    write_penalty: float = field(default=0.0, metadata=MAY_CHANGE)
    """Weight of a penalty on writing: the mean of the write gates' sigmoid over tokens, heads and layers, before a hard
    gate is cut. Gates that nothing holds open then close (after the L0 penalty of arXiv 1712.01312)."""
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
    slots: SlotsConfig = field(default_factory=SlotsConfig)

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
        if self.attachment != "slots":
            unused.add("slots")
        elif not self.overflow_layers:
            unused |= OF_RULES
        if self.attachment in LIKE_ATTENTION:
            unused |= {"heads", "head_dim", "conv", "persistent", "gate_rank"}
        if self.attachment == "overflow":
            unused.add("overflow_layers")
        elif not self.overflow_layers:
            unused.add("share")
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
        if not 0 <= self.write_penalty < math.inf:
            raise UserError(f"--model.memory.write-penalty {self.write_penalty}: give 0 or more")
        if not 0 < self.share < 1:
            raise UserError(f"--model.memory.share {self.share}: give a value between 0 and 1")
        check_words(self.layers, LAYERS)
        check_words(self.overflow_layers, OVERFLOW)
        if self.backend in ("cpu", "cuda") and self.chunk_start is not None:
            raise UserError(
                f"--model.memory.backend {self.backend}: the rule {self.rule} has no native kernel; give auto or torch"
            )


@dataclass(frozen=True)
class DistillationConfig:
    """What `--model.distil full` minimises: a weighted sum of means over tokens (docs/distillation.md)."""

    kl: float = field(default=1.0, metadata=MAY_CHANGE)
    """Weight of KL(teacher || student) of the logits, in nats a compared token."""
    cross_entropy: float = field(default=0.0, metadata=MAY_CHANGE)
    """Weight of the cross-entropy of every label; 0: it is not computed in training."""
    hidden: float = field(default=0.0, metadata=MAY_CHANGE)
    """Weight of the squared error of the hidden states after each layer with a memory, relative to the square of the
    teacher's, averaged over these layers and over the compared tokens."""
    attention: float = field(default=0.0, metadata=MAY_CHANGE)
    """Weight of the same error of the attention's output in each layer with a memory, before its output projection."""
    tokens: int = field(default=0, metadata=MAY_CHANGE)
    """Compared tokens per row and step, drawn at random from those beyond the window; 0: all of them."""
    lower_layers: Literal["full", "window"] = field(default="full", metadata=MAY_CHANGE)
    """Attention of the teacher below the first memory. full: as above it; window: the student's, so that these layers
    run once for both."""

    def __post_init__(self) -> None:
        at_least(0, self, "distillation", "tokens")
        for name in ("kl", "cross_entropy", "hidden", "attention"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"--model.distillation.{name.replace('_', '-')} is {value}: give 0 or more")
        if not (self.kl or self.hidden or self.attention):
            raise UserError("--model.distillation.kl, .hidden and .attention are 0: give one of them a weight above 0")


@dataclass(frozen=True)
class MirasConfig(ModelConfig):
    """A decoder (OLMo2 by default) with a neural long-term memory."""

    common: ClassVar[tuple[str, ...]] = (
        "backbone.pretrained",
        "backbone.trainable",
        "attention.kind",
        "attention.window",
        "memory.layers",
        "memory.pretrained",
        "memory.rule",
        "memory.attachment",
        "distil",
    )
    system: Suppress[str] = "miras"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    distil: Literal["none", "full"] = field(default="none", metadata=MAY_CHANGE)
    """none: train on cross-entropy; full: on the logits of the same frozen backbone with full attention and without
    memory, at tokens that see something beyond the window."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        if self.backbone.pretrained is None:
            chosen_layers(self.memory.layers, self.backbone.layers)
        if self.distil == "full":
            self._check_distillation()

    def _check_distillation(self) -> None:
        if self.backbone.trainable:
            raise UserError(
                "--model.distil full: the backbone is its own teacher and must stay as it is: leave out"
                " --model.backbone.trainable, or give --model.distil none"
            )
        if not self.memory.layers:
            raise UserError("--model.distil full: there is no memory to train: name --model.memory.layers")
        if self.attention.kind == "full":
            raise UserError(
                "--model.distil full: the student has full attention as well, and the teacher sees nothing beyond it:"
                " give --model.attention.kind window"
            )
        settings = self.distillation
        alone = len(self.memory.layers) == 1 and (isinstance(only := self.memory.layers[0], int) or only == "upper1")
        if (
            alone
            and self.memory.attachment == "residual"
            and not self.memory.overflow_layers
            and not (settings.kl or settings.hidden or settings.cross_entropy)
        ):
            raise UserError(
                "--model.distillation.attention: a residual memory is beside its layer's attention and changes only"
                " that of later layers with a memory, of which there are none: give --model.distillation.kl too"
            )
