"""Sizes and choices of the neuromorphic system."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from pipeline.errors import UserError
from pipeline.model_config import MAY_CHANGE, ModelConfig, Suppress, at_least
from pipeline.systems.neuromorphic.facts_config import FactsConfig

PHASES = ("A", "B", "C")
"""A: working and procedural memory; B: episodic memory too; C: both outlive documents (lifelong)."""
Tier = Literal["a", "a_wide", "b", "c", "tiny"]
DataPhase = Literal["A", "B", "B-streaming", "B-diverse", "C", "C-synthetic", "D", "E", "longctx"]
"""Names of sets of documents."""


@dataclass(frozen=True)
class Sizes:
    """What a tier is. D is the width, D/columns that of a column."""

    width: int
    layers: int
    """Of each column."""
    columns: int
    slots: int
    """Of the procedural memory of a layer of a column."""
    window: int
    """Tokens that the working memory sees, the current one included."""
    working_width: int
    working_heads: int
    episodes: int
    """Slots of the episodic memory of a column."""
    episodic_width: int
    retrieved: int
    """Episodes that a token reads."""
    candidates: int
    """Tokens of a span that a column writes as episodes."""
    decoder_width: int
    decoder_heads: int
    decoder_layers: int = 2
    thalamic_tokens: int = 4

    @property
    def column_width(self) -> int:
        return self.width // self.columns


TIERS: dict[str, Sizes] = {
    "a": Sizes(512, 8, 4, 8, 256, 128, 4, 256, 128, 4, 8, 256, 4),
    "a_wide": Sizes(768, 8, 4, 8, 256, 192, 6, 256, 128, 4, 8, 256, 4),
    "b": Sizes(768, 12, 6, 16, 512, 192, 6, 512, 192, 8, 16, 384, 6),
    "c": Sizes(1024, 24, 8, 32, 1024, 256, 8, 1024, 256, 16, 32, 512, 8, 3),
    "tiny": Sizes(128, 2, 2, 8, 64, 32, 2, 64, 32, 4, 8, 64, 2, 1),
}
"""Those of the published configurations, and one for two cores."""


@dataclass(frozen=True)
class NeuromorphicConfig(ModelConfig):
    """Columns of gated recurrent layers with a working, a procedural and an episodic memory."""

    common: ClassVar[tuple[str, ...]] = ("tier", "span", "as_published", "decoder", "data_phase", "val_data_phase")
    own_steps: ClassVar[tuple[str, ...]] = ("lifelong_steps",)
    system: Suppress[str] = "neuromorphic"
    tier: Annotated[Tier, tyro.conf.arg(aliases=["--tier"])] = "b"
    """Sizes: a 56M, a_wide 94M, b 102M, c 195M parameters; tiny for two cores."""
    vocab: int = 32000
    """Rows of embedding and head; the tokenizer's, once the data is read."""
    span: int = 64
    """Tokens between two writes of the memories: procedural memory commits and episodic memory writes at its end."""
    as_published: bool = False
    """The published structure: no positions in the working memory, one eligibility for all slots, recurrent inputs that
    are not scaled by what is forgotten."""
    decoder: bool = True
    """Whether the head reads the spatial decoder, which sums up columns and memories; without it, the columns' outputs
    alone."""
    lifelong_steps: int | None = field(default=None, metadata=MAY_CHANGE)
    """Steps of phase C in place of those of --steps, which takes its place where it is given."""
    data_phase: Annotated[DataPhase | None, tyro.conf.arg(aliases=["--data-phase"])] = field(
        default=None, metadata=MAY_CHANGE
    )
    """Set of documents that every phase reads where --data names no source. A: TinyStories; B, B-streaming: FineWeb-Edu
    .6, DCLM .4; B-diverse: FineWeb-Edu .7, SlimPajama .3; C: FineWeb-Edu .5, DCLM .35, FineMath .15; C-synthetic:
    Cosmopedia for DCLM; D: FineMath .5, OpenWebMath .5; E: FineWeb-Edu .7, Wikipedia .3; longctx: Wikipedia. Without: A
    in phase A, B in phases B and C."""
    val_data_phase: Annotated[DataPhase | None, tyro.conf.arg(aliases=["--val-data-phase"])] = field(
        default=None, metadata=MAY_CHANGE
    )
    """Set whose held-out documents are evaluated, of all phases; without: that of training."""
    eligibility_decay: float = 0.95
    """Factor per token of what the procedural memory is about to commit, rho."""
    decay: float = 0.999
    """Factor per span of the strengths of procedural memory."""
    width: int | None = None
    """In place of the tier's, as all that follow."""
    layers: int | None = None
    columns: int | None = None
    slots: int | None = None
    window: int | None = None
    working_width: int | None = None
    working_heads: int | None = None
    episodes: int | None = None
    episodic_width: int | None = None
    retrieved: int | None = None
    candidates: int | None = None
    decoder_width: Annotated[int | None, tyro.conf.arg(aliases=["--d-dec"])] = None
    decoder_heads: Annotated[int | None, tyro.conf.arg(aliases=["--n-heads-decoder"])] = None
    decoder_layers: Annotated[int | None, tyro.conf.arg(aliases=["--decoder-layers"])] = None
    thalamic_tokens: Annotated[int | None, tyro.conf.arg(aliases=["--thalamic-tokens"])] = None
    strength_penalty: float = field(default=0.01, metadata=MAY_CHANGE)
    """Weight of what the strengths of a memory exceed 0.9 of their budget by."""
    facts: FactsConfig | None = None
    """The synthetic facts task in place of documents."""

    @property
    def sizes(self) -> Sizes:
        """The tier's, with what is given in place of it."""
        names = (item.name for item in dataclasses.fields(Sizes))
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(TIERS[self.tier], **given)

    def __post_init__(self) -> None:
        at_least(1, self, "", "span", "vocab")
        sizes = self.sizes
        for item in dataclasses.fields(Sizes):
            if getattr(sizes, item.name) < 1:
                flag = item.name.replace("_", "-")
                raise UserError(f"--model.{flag} is {getattr(sizes, item.name)}: give 1 or more")
        if self.lifelong_steps is not None:
            at_least(1, self, "", "lifelong_steps")
        if sizes.width % sizes.columns:
            raise UserError(
                f"--model.columns {sizes.columns} does not divide the width {sizes.width}: give a divisor of it"
            )
        for heads, width, what in (
            ("working_heads", sizes.working_width, "working width"),
            ("decoder_heads", sizes.decoder_width, "width of the decoder"),
        ):
            count = getattr(sizes, heads)
            if width % count:
                flag = heads.replace("_", "-")
                raise UserError(f"--model.{flag} {count} does not divide the {what} {width}: give a divisor of it")
        if sizes.working_width // sizes.working_heads % 2:
            raise UserError(
                f"--model.working-width {sizes.working_width}: a head of {sizes.working_width // sizes.working_heads}"
                f" cannot be turned by its position, which takes pairs: give a multiple of {2 * sizes.working_heads}"
            )
        for name in ("eligibility_decay", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                flag = name.replace("_", "-")
                raise UserError(f"--model.{flag} is {getattr(self, name)}: give a factor from 0 to 1")
        if self.span > sizes.window:
            raise UserError(f"--model.span {self.span} is longer than the window of {sizes.window}: give at most that")
