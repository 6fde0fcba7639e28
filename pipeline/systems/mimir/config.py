"""Sizes and choices of the mimir system."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from pipeline.errors import UserError, shown
from pipeline.model_config import MAY_CHANGE, ModelConfig, Suppress, at_least

LETTERS = "ABCDEFGHIKLMNPQRSTUVWXYZ"
"""The 20 amino acids with selenocysteine (U) and the ambiguous B, X and Z, as the guide's data has them."""


def check_letters(letters: str, flag: str) -> None:
    """Raises UserError for an alphabet that residues cannot have."""
    ordered = list(letters) == sorted(set(letters)) and letters.isascii() and letters.isalpha() and letters.isupper()
    if len(letters) < 2 or not ordered:
        raise UserError(f"{flag} {shown(letters)}: give two or more different letters of A to Z in their order")


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder of a target's amino-acid sequence (--model.target encoder)."""

    width: int = 64
    """Channels of its convolutions."""
    layers: int = 2
    """Convolutions of residues."""
    longest: int = 1024
    """Residues of a target that are read: its first."""

    def __post_init__(self) -> None:
        at_least(1, self, "encoder", "width", "layers", "longest")


@dataclass(frozen=True)
class MimirConfig(ModelConfig):
    """A transformer that predicts the residues of a peptide from a noisy one."""

    common: ClassVar[tuple[str, ...]] = (
        "width", "layers", "heads", "kernel", "timesteps", "loss", "hybrid_loss_coeff", "length", "target", "balanced",
    )  # fmt: skip
    system: Suppress[str] = "mimir"
    width: Annotated[int, tyro.conf.arg(aliases=["--dim"])] = 128
    """Width of the hidden states."""
    layers: Annotated[int, tyro.conf.arg(aliases=["--num-layers"])] = 3
    """Blocks of attention and MLP."""
    heads: Annotated[int, tyro.conf.arg(aliases=["--num-heads"])] = 4
    """Attention heads."""
    kernel: Literal["uniform", "absorbing"] = "uniform"
    """What noise does to a residue. uniform: it may become any other (D3PM); absorbing: it is masked."""
    timesteps: Annotated[int, tyro.conf.arg(aliases=["--n-timesteps"])] = 10
    """Steps of the noise, T."""
    loss: Literal["hybrid", "cross_entropy", "bound"] = field(default="hybrid", metadata=MAY_CHANGE)
    """hybrid: ce + --hybrid-loss-coeff x vb; cross_entropy: ce alone; bound: vb, the variational bound, alone."""
    hybrid_loss_coeff: Annotated[float, tyro.conf.arg(aliases=["--hybrid-loss-coeff"])] = field(
        default=0.0, metadata=MAY_CHANGE
    )
    """Weight of the variational bound (vb) in the hybrid loss."""
    curriculum_epochs: Annotated[float, tyro.conf.arg(aliases=["--curriculum-warmup-epochs"])] = field(
        default=0.0, metadata=MAY_CHANGE
    )
    """Epochs over which the noisiest timestep rises from 1 to T; 0: all from the start."""
    mask_weight: Annotated[float, tyro.conf.arg(aliases=["--loss-weight-alpha"])] = field(
        default=0.0, metadata=MAY_CHANGE
    )
    """Exponent of a peptide's share of masked residues as the weight of its cross-entropy (absorbing kernel alone)."""
    length: Literal["empirical", "head"] = "empirical"
    """How the length of a peptide is drawn. empirical: as often as in the training data of its label; head: from a
    distribution that the model learns given label and target."""
    target: Literal["table", "encoder"] = "table"
    """How a target is told to the model. table: a vector for each; encoder: by its amino-acid sequence, so that targets
    work that training never saw."""
    targets: int = 803
    """Vectors of the table beside that of no target; what the training data has, once it is read."""
    target_names: Suppress[tuple[str, ...]] = field(default=(), metadata=MAY_CHANGE)
    """Names of the targets of the table in their order, which the training data has."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    label_dropout: float = field(default=0.1, metadata=MAY_CHANGE)
    """Share of the examples whose label (with its target) is withheld in training, for guidance."""
    target_dropout: float = field(default=0.1, metadata=MAY_CHANGE)
    """Share of the examples with a target whose target alone is withheld in training."""
    letters: str = LETTERS
    """The residues, one letter each."""
    min_length: int = 4
    """Residues of the shortest peptide."""
    max_length: int = 20
    """Residues of the longest peptide."""
    balanced: Annotated[bool, tyro.conf.arg(aliases=["--balanced"])] = field(default=True, metadata=MAY_CHANGE)
    """Draw interacting and background peptides equally often, whatever their numbers; an epoch has as many examples as
    the training data all the same."""
    held_out_peptides: int = field(default=4096, metadata=MAY_CHANGE)
    """Held-out peptides that an evaluation during training reads at the most, the same ones every time, whatever the
    batch size and the number of ranks; with --model.balanced half of each label, if there are so many. 0: all."""
    target_file: str | None = field(default=None, metadata=MAY_CHANGE)
    """FASTA file of the targets' amino-acid sequences, for --model.target encoder."""

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """Fields that mean nothing beside the others."""
        return ("targets", "target_names") if self.target == "encoder" else ("encoder",)

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding, V: padding, the letters, and the mask of the absorbing kernel."""
        return 1 + len(self.letters) + (self.kernel == "absorbing")

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "timesteps", "min_length", "max_length"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"--model.{name.replace('_', '-')} is {shown(value)}: give 1 or more")
        if self.width % self.heads or self.width % 2:
            raise UserError(f"--model.width {self.width}: give a multiple of 2 and of the {self.heads} heads")
        if self.min_length > self.max_length:
            raise UserError(
                f"--model.min-length {self.min_length} is above --model.max-length {self.max_length}: exchange them"
            )
        if self.kernel == "absorbing" and self.timesteps < self.max_length:
            raise UserError(
                f"--model.timesteps {self.timesteps}: the absorbing kernel masks a residue a step or more: give"
                f" --model.max-length ({self.max_length}) or more"
            )
        check_letters(self.letters, "--model.letters")
        for name in ("targets", "held_out_peptides"):
            if getattr(self, name) < 0:
                raise UserError(f"--model.{name.replace('_', '-')} is {getattr(self, name)}: give 0 or more")
        for name in ("hybrid_loss_coeff", "curriculum_epochs", "mask_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"--model.{name.replace('_', '-')} is {value}: give 0 or more")
        if self.mask_weight and self.kernel != "absorbing":
            raise UserError(f"--model.mask-weight {self.mask_weight}: only the absorbing kernel masks: leave it out")
        for name in ("label_dropout", "target_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--model.{name.replace('_', '-')} is {getattr(self, name)}: give a share below 1")
