"""`generate` of this system: options to peptides, and what is known of each of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.capabilities import Drawn
from pipeline.errors import UserError
from pipeline.evaluation_result import Row
from pipeline.files.given_path import expanded
from pipeline.spelling import did_you_mean, nearest
from pipeline.systems.mimir.config import MimirConfig
from pipeline.systems.mimir.data.encode import decode
from pipeline.systems.mimir.data.table import read_targets
from pipeline.systems.mimir.diffusion.absorbing import AbsorbingKernel
from pipeline.systems.mimir.peptides import BACKGROUND, INTERACTING, NO_TARGET, PeptideSet
from pipeline.systems.mimir.sampling.batch import (
    Conditions,
    Predicts,
    Settings,
    batches,
    bound_batch,
    draw_batch,
    sequences_of,
)
from pipeline.systems.mimir.sampling.nearest import nearest as nearest_peptides
from pipeline.systems.mimir.sampling.options import PeptideOptions
from pipeline.systems.mimir.sampling.output import as_text, write

BUDGET = 20
"""Peptides that are drawn at the most for each that is asked for, where some come up twice."""
DOMAIN = "generate"


class Reads(Predicts, Protocol):
    """What is needed besides of the system: its data, for the nearest training peptides and for targets' sequences."""

    @property
    def peptides(self) -> PeptideSet: ...


@dataclass(frozen=True)
class Wanted:
    """What peptides are drawn for."""

    label: int
    target: int = NO_TARGET
    name: str = ""
    sequence: str | None = None
    """Amino acids of the target, where it is told by them."""

    def conditions(self, rows: int, sizes: MimirConfig, device: torch.device) -> Conditions:
        """For so many peptides."""
        told = sequences_of(self.sequence, rows, sizes, device) if sizes.target == "encoder" else None
        return Conditions(
            torch.full((rows,), self.label, device=device), torch.full((rows,), self.target, device=device), told
        )


@dataclass(frozen=True)
class Found:
    """Peptides in the order in which they were drawn: letters [N, L] and lengths [N] int64; how many were drawn in
    all, those that came up twice included."""

    letters: Tensor
    lengths: Tensor
    drawn: int


def check(system: Reads, options: PeptideOptions) -> None:
    """Raises UserError for options that the system cannot follow."""
    sizes = system.sizes
    for flag, value in (("--min-length", options.min_length), ("--max-length", options.max_length)):
        if value is not None and not sizes.min_length <= value <= sizes.max_length:
            raise UserError(
                f"{flag} {value}: peptides of this model have {sizes.min_length} to {sizes.max_length} residues: give a"
                " number of these"
            )
    if options.steps is not None and options.steps > sizes.timesteps:
        raise UserError(f"--steps {options.steps}: the model has {sizes.timesteps} timesteps: give as many at the most")
    if options.guidance != 1 and not sizes.label_dropout:
        raise UserError(
            f"--guidance {options.guidance:g}: the model never learned peptides without a label"
            " (--model.label-dropout 0): leave it out"
        )
    if options.order is not None and not isinstance(system.kernel, AbsorbingKernel):
        raise UserError(
            f"--order {options.order}: only the absorbing kernel reveals one residue after the other: leave it out"
        )
    wanted(system, options)


def wanted(system: Reads, options: PeptideOptions) -> Wanted:
    """Label and target of the options. Raises UserError for a target that the model does not know."""
    sizes = system.sizes
    if options.target_sequence is not None and sizes.target != "encoder":
        raise UserError("--target-sequence: this model knows targets by their names alone: give --target NAME")
    if options.non_interacting:
        return Wanted(BACKGROUND)
    if options.target_sequence is not None:
        return Wanted(INTERACTING, sequence=options.target_sequence.upper())
    if options.target is None:
        return Wanted(INTERACTING)
    if sizes.target == "encoder":
        known = target_sequences(system)
        check_name(options.target, list(known))
        return Wanted(INTERACTING, name=options.target, sequence=known[options.target])
    check_name(options.target, sizes.target_names)
    return Wanted(INTERACTING, sizes.target_names.index(options.target), options.target)


def target_sequences(system: Reads) -> dict[str, str]:
    """Amino acids by the target's name: of the run's file of targets, else of its data. Raises UserError."""
    if system.sizes.target_file is not None:
        return read_targets(expanded(system.sizes.target_file))
    known = system.peptides
    return dict(zip(known.target_names, known.target_sequences or (), strict=False))


def check_name(name: str, known: Sequence[str]) -> None:
    """Raises UserError, with the nearest names, for a target that is not among those known."""
    if name in known:
        return
    if not known:
        raise UserError(f"--target {name}: this model was trained on no targets: leave it out")
    meant = did_you_mean(nearest(name, known))
    few = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
    raise UserError(f"--target {name}: not among the {len(known)} targets of this model{meant or f', such as {few}'}")


def draw(system: Reads, model: nn.Module, options: PeptideOptions) -> Drawn:
    """The peptides of the options, printed or written. Raises UserError."""
    check(system, options)
    condition = wanted(system, options)
    model = model.to(getattr(torch, options.dtype))
    begun = time.perf_counter()
    found = draw_peptides(system, model, condition, options)
    seconds = time.perf_counter() - begun
    rows, notes = describe(system, model, condition, found, options)
    count = len(found.lengths)
    rate = f"{found.drawn / max(seconds, 1e-9):.0f}"
    said = [f"drew {found.drawn} peptides in {seconds:.1f} s ({rate} a second)"]
    if count < options.number:
        said.append(f"only {count} of the {options.number} asked for: the others are copies of these")
    elif found.drawn > count:
        said.append(f"{found.drawn - count} copies were left out")
    if options.non_interacting and (options.target or options.target_sequence):
        said.append("background peptides have no target: drawn without one")
    said += notes
    if options.output is None:
        return Drawn(rows, as_text(rows), "; ".join(said))
    write(expanded(options.output), rows)
    return Drawn(rows, "", "; ".join([*said, f"written to {options.output}"]))


def draw_peptides(system: Reads, model: nn.Module, condition: Wanted, options: PeptideOptions) -> Found:
    """`options.number` peptides, or as many different ones as `BUDGET` times as many draws give. A function of the
    seed, whatever the batch size. Raises UserError."""
    sizes, device = system.sizes, next(model.parameters()).device
    settings = Settings(
        sizes.min_length if options.min_length is None else options.min_length,
        sizes.max_length if options.max_length is None else options.max_length,
        options.temperature,
        options.guidance,
        options.steps,
        options.order or "confidence",
    )
    seen: set[tuple[int, ...]] = set()
    letters: list[Tensor] = []
    lengths: list[Tensor] = []
    most = options.number * (BUDGET if options.unique else 1)
    number = 0
    while number < most and len(letters) < options.number:
        rows = min(options.batch_size, options.number - len(letters), most - number)
        draws = torch.arange(number, number + rows, device=device)
        conditions = condition.conditions(rows, sizes, device)
        parts = draw_batch(system, model, conditions, settings, seed=options.seed, domain=DOMAIN, draw=draws)
        number += rows
        for row, length in zip(*parts, strict=True):
            key = tuple(row[: int(length)].tolist())
            if not options.unique or key not in seen:
                seen.add(key)
                letters.append(row)
                lengths.append(length)
    return Found(torch.stack(letters), torch.stack(lengths), number)


def describe(
    system: Reads, model: nn.Module, condition: Wanted, found: Found, options: PeptideOptions
) -> tuple[list[Row], list[str]]:
    """A row for each peptide, and what a person should know of them all. Raises UserError."""
    sizes, count = system.sizes, len(found.lengths)
    lengths = found.lengths.cpu().numpy()
    sequences = decode(found.letters.cpu().numpy(), lengths, sizes.letters)
    nats = np.full(count, np.nan)
    if options.likelihood:
        for part in batches(count, options.batch_size):
            letters, own = found.letters[part], found.lengths[part]
            conditions = condition.conditions(len(own), sizes, own.device)
            nats[part] = bound_batch(system, model, conditions, letters, own, options.likelihood).cpu().numpy()
    notes: list[str] = []
    near: list[tuple[int, str]] = []
    if options.novelty:
        try:
            near = nearest_training(system, sequences)
        except UserError as error:
            notes.append(f"novelty is not known: {error}")
    rows: list[Row] = []
    for row, sequence in enumerate(sequences):
        edits, closest = near[row] if near else (None, None)
        bits = float(nats[row]) / (math.log(2) * int(lengths[row]))
        rows.append(
            {
                "label": condition.label,
                "target": condition.name,
                "sequence": sequence,
                "length": int(lengths[row]),
                "nats": float(nats[row]) if options.likelihood else None,
                "bits_per_residue": bits if options.likelihood else None,
                "novel": None if edits is None else "yes" if edits else "no",
                "edits": edits,
                "nearest": closest,
            }
        )
    return rows, notes


def nearest_training(system: Reads, sequences: Sequence[str]) -> list[tuple[int, str]]:
    """(edits, sequence) of the training peptide that is nearest to each. Raises UserError."""
    training = system.peptides.training
    known = decode(training.letters, training.lengths, system.sizes.letters)
    edits, index = nearest_peptides(sequences, known)
    return [(int(distance), known[place]) for distance, place in zip(edits, index, strict=True)]
