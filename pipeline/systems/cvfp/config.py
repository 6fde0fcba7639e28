"""Sizes and choices of the cvfp system."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from pipeline.errors import UserError
from pipeline.model_config import MAY_CHANGE, ModelConfig, Suppress, at_least


@dataclass(frozen=True)
class SolveConfig:
    """How the contexts of a pass are computed at fixed weights (--model.solve)."""

    way: Literal["sequential", "jacobi", "newton"] = "sequential"
    """sequential: token after token, for all documents of a batch at once, which is exact; jacobi: all tokens at once
    from the contexts of the sweep before, as often as needed; newton: the same with the diagonal of the Jacobian, whose
    linear recurrence a scan solves (quasi-DEER)."""
    tolerance: float = 1e-4
    """Jacobi and Newton sweeps end when no context moved by more than this share of its norm."""
    most: int = 256
    """Sweeps at most; Jacobi needs as many as there are tokens in the worst case."""

    def __post_init__(self) -> None:
        at_least(1, self, "solve", "most")
        if not 0 < self.tolerance < math.inf:
            raise UserError(f"--model.solve.tolerance is {self.tolerance}: give a number above 0")


@dataclass(frozen=True)
class FixedPointConfig:
    """The first phase: contexts that forget where they began, and differ from each other (--model.fixed-point)."""

    iterations: Annotated[int, tyro.conf.arg(aliases=["--phase1-max-iterations", "--max-iterations"])] = 10
    """Passes over all tokens at most."""
    steps: Suppress[int] = field(default=0, metadata=MAY_CHANGE)
    """Updates in so many passes; the data decides it."""
    threshold: Annotated[float, tyro.conf.arg(aliases=["--phase1-convergence-threshold"])] = field(
        default=0.05, metadata=MAY_CHANGE
    )
    """Mean square of the difference of two contexts, over their dimensions, below which a token has converged."""
    converged: Annotated[float, tyro.conf.arg(aliases=["--phase1-min-converged-ratio"])] = field(
        default=0.95, metadata=MAY_CHANGE
    )
    """Share of converged tokens at which the phase ends. It is asked at each evaluation that is due (--epochs.evaluate,
    --eval-every): with none, the phase makes all its passes."""
    lr: Annotated[float, tyro.conf.arg(aliases=["--phase1-learning-rate"])] = field(default=0.0003, metadata=MAY_CHANGE)
    """Peak learning rate of the phase. More makes contexts forget sooner, at a lower effective rank."""
    distance: Literal["raw", "cosine"] = field(default="raw", metadata=MAY_CHANGE)
    """raw: mean square of the difference to the context of the pass before; cosine: 2 (1 - cos) of both."""
    diversity: Literal["variance", "log_det"] = field(default="log_det", metadata=MAY_CHANGE)
    """Of the contexts' second moments. log_det: (tr M - log det M) / D - 1, 0 where they are the identity; variance: a
    hinge on the root mean square of each dimension and a penalty of the moments of two."""
    diversity_weight: Annotated[float, tyro.conf.arg(aliases=["--dist-reg-weight"])] = field(
        default=0.5, metadata=MAY_CHANGE
    )
    """w of (1 - w) x distance + w x diversity."""
    momentum: Annotated[float, tyro.conf.arg(aliases=["--ema-momentum"])] = 0.9
    """Of the moving average of the contexts' second moments, per update."""
    noise: Annotated[float, tyro.conf.arg(aliases=["--context-noise-std"])] = field(default=0.01, metadata=MAY_CHANGE)
    """Standard deviation of the noise on the contexts that enter a training step."""
    start: Literal["zero", "other"] = field(default="other", metadata=MAY_CHANGE)
    """Where a pass over a document starts. zero: at zero, always; other: in every second pass at the end of another
    document, so that the distance to the pass before says whether the start is forgotten."""

    def __post_init__(self) -> None:
        at_least(1, self, "fixed_point", "iterations")
        for name in ("threshold", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--model.fixed-point.{name} is {getattr(self, name)}: give a number above 0")
        for name in ("converged", "diversity_weight"):
            if not 0 <= getattr(self, name) <= 1:
                flag = name.replace("_", "-")
                raise UserError(f"--model.fixed-point.{flag} is {getattr(self, name)}: give a share from 0 to 1")
        if not 0 <= self.momentum < 1:
            raise UserError(f"--model.fixed-point.momentum is {self.momentum}: give a share below 1")
        if not 0 <= self.noise < math.inf:
            raise UserError(f"--model.fixed-point.noise is {self.noise}: give 0 or more")


@dataclass(frozen=True)
class PredictionConfig:
    """The second phase: the next token from the token stream (--model.prediction)."""

    freeze_context: Annotated[bool, tyro.conf.arg(aliases=["--freeze-context"])] = False
    """Train the head alone, on token states that are computed once and cached; otherwise blocks and head."""
    refresh: int = field(default=1, metadata=MAY_CHANGE)
    """Epochs after which the contexts that enter a training step are computed anew, of blocks that are trained."""
    context: Literal["learnt", "zero"] = "learnt"
    """zero: every token is read with the context zero, for comparison: what a model has without any context."""

    def __post_init__(self) -> None:
        at_least(1, self, "prediction", "refresh")


@dataclass(frozen=True)
class CvfpConfig(ModelConfig):
    """Blocks that read a token into a context vector, again and again."""

    common: ClassVar[tuple[str, ...]] = (
        "width", "layers", "carry", "decay", "embedding", "as_published", "fixed_point.iterations",
        "fixed_point.diversity_weight", "prediction.freeze_context", "prediction.context",
    )  # fmt: skip
    system: Suppress[str] = "cvfp"
    width: Annotated[int, tyro.conf.arg(aliases=["--context-dim", "--embed-dim"])] = 768
    """Width of contexts and of token states, D; that of the embedding."""
    layers: Annotated[int, tyro.conf.arg(aliases=["--num-layers"])] = 6
    """Blocks."""
    vocab: int = 50257
    """Rows of embedding and head; the tokenizer's, once the data is read."""
    carry: Annotated[Literal["document", "stream", "circular"], tyro.conf.arg(aliases=["--carry"])] = "document"
    """Where a context comes from. document: it is zero before each document; stream: it goes on from document to
    document; circular: as stream, and the first token goes on from the last one of the pass before. Token after token,
    each row is a part of the stream, and begins at the end that its left neighbour had in the pass before; with jacobi
    or newton the rows of a step follow each other, and what crosses their borders moves with every sweep."""
    decay: Annotated[float, tyro.conf.arg(aliases=["--context-decay"])] = 0.5
    """Factor of the context that goes into a block's sum with what it adds: smaller forgets sooner."""
    layernorm_mix: Annotated[float, tyro.conf.arg(aliases=["--layernorm-mix"])] = 1.0
    """m: what goes on from a block is (1 - m) x the sum of a stream + m x its LayerNorm."""
    initial_std: float = 0.02
    """Standard deviation of the blocks' initial weights."""
    as_published: bool = False
    """The published initialisation and recurrence: weights of standard deviation 0.1 and no decay, which is chaotic."""
    embedding: str | None = None
    """Folder or hub name (NAME or NAME@REVISION) of a transformers model whose input embedding is taken, frozen, such
    as gpt2; None: a random one, which is trained in the second phase."""
    train_embedding: bool = False
    """Train the embedding in the second phase also where it is a given one."""
    solve: SolveConfig = field(default_factory=SolveConfig)
    fixed_point: FixedPointConfig = field(default_factory=FixedPointConfig)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    num_samples: Annotated[int | None, tyro.conf.arg(aliases=["--num-samples"])] = None
    """Documents to train on; those that are held out come beside them. Of a data set its first ones, of files a random
    choice that is always the same; None: all, of which some are held out."""
    data_cache: Annotated[str, tyro.conf.arg(aliases=["--cache-dir"])] = field(default="cache", metadata=MAY_CHANGE)
    """Folder for tokenised data and for frozen contexts; it may be a link."""
    test: Annotated[bool, tyro.conf.arg(aliases=["--test"])] = field(default=False, metadata=MAY_CHANGE)
    """Run the first phase alone, and say of each of the guide's criteria whether it is met."""

    @property
    def adjacent(self) -> bool:
        """Whether the rows of a step follow each other in the stream, so that sweeps cross their borders."""
        return self.carry != "document" and self.solve.way != "sequential"

    @property
    def trains_embedding(self) -> bool:
        """Whether the second phase trains it: not below contexts that are frozen, which read it."""
        return not self.prediction.freeze_context and (self.train_embedding or self.embedding is None)

    def __post_init__(self) -> None:
        for name in ("width", "layers", "vocab"):
            if getattr(self, name) < 1:
                raise UserError(f"--model.{name} is {getattr(self, name)}: give 1 or more")
        if not 0 <= self.decay <= 1:
            raise UserError(f"--model.decay is {self.decay}: give a factor from 0 to 1")
        if not 0 < self.layernorm_mix <= 1:
            raise UserError(f"--model.layernorm-mix is {self.layernorm_mix}: give a share above 0, up to 1")
        if not 0 < self.initial_std < math.inf:
            raise UserError(f"--model.initial-std is {self.initial_std}: give a number above 0")
        for name in ("decay", "initial_std"):
            if self.as_published and getattr(self, name) != getattr(CvfpConfig, name):
                flag = name.replace("_", "-")
                raise UserError(
                    f"--model.{flag} {getattr(self, name)} with --model.as-published, which has its own: leave one out"
                )
        if self.prediction.freeze_context and self.train_embedding:
            raise UserError(
                "--model.train-embedding with --freeze-context, whose states read the embedding: leave one out"
            )
        if self.num_samples is not None and self.num_samples < 1:
            raise UserError(f"--num-samples is {self.num_samples}: give 1 or more")
