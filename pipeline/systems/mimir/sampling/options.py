"""What a user chooses of new peptides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.capabilities import DrawOptions
from pipeline.errors import UserError
from pipeline.files.given_path import expanded

SUFFIXES = (".csv", ".fasta", ".fa", ".faa")


@dataclass(frozen=True)
class PeptideOptions(DrawOptions):
    """New peptides that a model draws, each with the variational bound on its likelihood and the training peptide that
    is nearest to it. Printed as a table, or written with --output."""

    number: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 10
    """Peptides to draw."""
    target: Annotated[str | None, tyro.conf.arg(aliases=["-t"])] = None
    """Name of the target that they are to interact with; None: of no target in particular."""
    target_sequence: str | None = None
    """Amino acids of a target in the place of a name, of a model that reads them (--model.target encoder)."""
    interacting: tyro.conf.FlagCreatePairsOff[bool] = False
    """Interacting peptides; they are drawn by default."""
    non_interacting: tyro.conf.FlagCreatePairsOff[bool] = False
    """Background peptides, which have no target."""
    min_length: int | None = None
    """Fewest residues; None: of the model."""
    max_length: int | None = None
    """Most residues; None: of the model."""
    temperature: float = 1.0
    """Below 1 likely residues become likelier, above 1 less so; 0: the likeliest in every prediction of the model."""
    guidance: float = 1.0
    """How much label and target count, for the residues and for the lengths of a length head. 1: as in the training
    data; above 1 more; 0: not at all."""
    steps: int | None = None
    """Steps from noise to peptide; fewer than the model's timesteps skip some. None: all of them."""
    order: Literal["confidence", "random"] | None = None
    """Which residues the absorbing kernel reveals first: those that the model is surest of (None means this), or any.
    The residues are drawn either way."""
    seed: int = 0
    """The same seed draws the same peptides."""
    unique: bool = True
    """Give no peptide twice."""
    likelihood: int = 4
    """Draws of noise at each timestep for the bound on the likelihood; 0: leave it out."""
    novelty: bool = True
    """Find the nearest training peptide of each; the run's data has to be where it was."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write a file in place of the table, .csv or .fasta."""
    batch_size: int = 256
    """Peptides that are drawn at a time; it does not change them."""
    dtype: Literal["float32", "float64"] = "float64"
    """Of the weights. In float64 rounding does not make a peptide depend on the batch size or the device."""

    def __post_init__(self) -> None:
        least: dict[str, tuple[float | None, int]] = {
            "-n": (self.number, 1),
            "--min-length": (self.min_length, 1),
            "--max-length": (self.max_length, 1),
            "--steps": (self.steps, 1),
            "--likelihood": (self.likelihood, 0),
            "--batch-size": (self.batch_size, 1),
            "--temperature": (self.temperature, 0),
            "--guidance": (self.guidance, 0),
        }
        for flag, (value, lowest) in least.items():
            if value is not None and not lowest <= value < math.inf:
                raise UserError(f"{flag} {value}: give {lowest} or more")
        if self.min_length is not None and self.max_length is not None and self.min_length > self.max_length:
            raise UserError(
                f"--min-length {self.min_length} is above --max-length {self.max_length}: exchange them, or widen the"
                " range"
            )
        if self.interacting and self.non_interacting:
            raise UserError("--interacting and --non-interacting are both given: leave one out")
        if self.target is not None and self.target_sequence is not None:
            raise UserError("--target and --target-sequence are both given: leave one out")
        sequence = self.target_sequence
        if sequence is not None and not (sequence.isascii() and sequence.isalpha()):
            raise UserError("--target-sequence is no sequence of amino acids: give their letters")
        if self.output is not None:
            check_output(expanded(self.output))


def check_output(path: Path) -> None:
    """Raises UserError for a file that cannot be written, or would be lost."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--output {path}: give a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}: make it, or name another file")
    if path.exists():
        raise UserError(f"--output {path} is there already: remove it, or name another file")
