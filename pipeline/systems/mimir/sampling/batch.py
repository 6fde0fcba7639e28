"""Peptides of given labels and targets, some at a time, from a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.systems.mimir.config import MimirConfig
from pipeline.systems.mimir.diffusion.bound import peptide_bound
from pipeline.systems.mimir.diffusion.kernel import Kernel
from pipeline.systems.mimir.model import ModelOutput, TargetSequences
from pipeline.systems.mimir.model.sequences import encode
from pipeline.systems.mimir.peptides import DROPPED, NO_TARGET
from pipeline.systems.mimir.sampling.sampler import Denoise, Order, draw_lengths, guided, sample, weighed


class Predicts(Protocol):
    """What a sampler needs of the system."""

    sizes: MimirConfig
    kernel: Kernel

    def predict(
        self,
        model: nn.Module,
        states: Tensor,
        t: Tensor,
        lengths: Tensor,
        labels: Tensor,
        targets: Tensor,
        sequences: TargetSequences | None = None,
    ) -> ModelOutput: ...


@dataclass(frozen=True)
class Conditions:
    """What peptides are drawn for: labels and targets [rows] int64, as in `PeptideBatch`. `sequences`: of the targets,
    where these are told by their sequences; None: those of the data."""

    labels: Tensor
    targets: Tensor
    sequences: TargetSequences | None = None

    @property
    def rows(self) -> int:
        return len(self.labels)

    def withheld(self, sizes: MimirConfig) -> Conditions:
        """As many peptides for no condition."""
        labels = torch.full_like(self.labels, DROPPED)
        targets = torch.full_like(self.targets, NO_TARGET)
        nothing = sequences_of(None, self.rows, sizes, labels.device) if sizes.target == "encoder" else None
        return Conditions(labels, targets, nothing)


@dataclass(frozen=True)
class Settings:
    """How peptides are drawn, as the options of the same names say."""

    least: int
    """Fewest residues."""
    most: int
    """Most residues."""
    temperature: float = 1.0
    guidance: float = 1.0
    steps: int | None = None
    order: Order = "confidence"


def sequences_of(sequence: str | None, rows: int, sizes: MimirConfig, device: torch.device) -> TargetSequences:
    """One target's amino acids for all rows; None: no target."""
    ids = torch.from_numpy(encode([sequence or ""], sizes.encoder.longest)).long().to(device)
    return TargetSequences(ids, torch.full((rows,), -1 if sequence is None else 0, device=device))


def denoiser(system: Predicts, model: nn.Module, conditions: Conditions, lengths: Tensor) -> Denoise:
    """What the model says of x_0 under these conditions."""

    def denoise(xt: Tensor, t: Tensor) -> Tensor:
        labels, targets, sequences = conditions.labels, conditions.targets, conditions.sequences
        return system.predict(model, xt, t, lengths, labels, targets, sequences).logits

    return denoise


def _log_lengths(system: Predicts, model: nn.Module, conditions: Conditions) -> Tensor:
    """log p(length | conditions), [rows, longest + 1]."""
    ones, longest = torch.ones_like(conditions.labels), system.sizes.max_length
    blank = torch.zeros((conditions.rows, longest), dtype=torch.int64, device=ones.device)
    return system.predict(
        model, blank, ones, ones * longest, conditions.labels, conditions.targets, conditions.sequences
    ).log_lengths


@torch.no_grad()
def draw_batch(
    system: Predicts,
    model: nn.Module,
    conditions: Conditions,
    settings: Settings,
    *,
    seed: int,
    domain: str,
    draw: Tensor,
) -> tuple[Tensor, Tensor]:
    """Peptides as (letters [rows, L], lengths [rows]) int64, L the longest of the model, on the model's device.

    A row is a function of its conditions, settings, seed, domain and draw [rows] int64, whatever the other rows are.
    Their model is in evaluation mode. Raises UserError.
    """
    sizes, nothing = system.sizes, conditions.withheld(system.sizes)
    log_lengths = _log_lengths(system, model, conditions)
    # Empirical lengths are those of the label in the data, whose scatter guidance would only enlarge.
    if sizes.length == "head" and settings.guidance != 1:
        log_lengths = weighed(log_lengths, _log_lengths(system, model, nothing), settings.guidance)
    lengths = draw_lengths(log_lengths, settings.least, settings.most, seed=seed, domain=domain, draw=draw)
    denoise = guided(
        denoiser(system, model, conditions, lengths), denoiser(system, model, nothing, lengths), settings.guidance
    )
    letters = sample(
        system.kernel,
        denoise,
        lengths,
        sizes.max_length,
        seed=seed,
        domain=domain,
        draw=draw,
        steps=settings.steps,
        order=settings.order,
        temperature=settings.temperature,
    )
    return letters, lengths


@torch.no_grad()
def bound_batch(
    system: Predicts, model: nn.Module, conditions: Conditions, letters: Tensor, lengths: Tensor, repeats: int
) -> Tensor:
    """The variational bound on -log p(peptide | length, conditions) in nats, [rows] float64, of peptides as
    `draw_batch` gives them: every timestep with `repeats` draws of noise, the same for each row."""
    kernel = system.kernel
    return peptide_bound(
        kernel,
        denoiser(system, model, conditions, lengths),
        letters,
        lengths,
        seed=0,
        domain="likelihood",
        draw=torch.zeros_like(lengths),
        samples=repeats * kernel.T,
    )


def batches(count: int, size: int) -> Iterator[slice]:
    """Of `count` rows, `size` at a time."""
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))
