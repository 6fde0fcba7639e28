"""Held-out peptides: the variational bound and the cross-entropy at every timestep, and their floor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.batch import StatefulLoader
from pipeline.parallel.loss import reduce_sums
from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.systems.mimir.config import MimirConfig
from pipeline.systems.mimir.diffusion.floor import Floor, floor
from pipeline.systems.mimir.diffusion.kernel import Kernel
from pipeline.systems.mimir.losses import loss_weights
from pipeline.systems.mimir.model import ModelOutput
from pipeline.systems.mimir.peptides import BACKGROUND, INTERACTING, PeptideBatch, Peptides

KINDS = {"interacting": INTERACTING, "background": BACKGROUND}
SUMS = ("nats", "residues", "ce", "ce count", "length", "peptides")
"""What is added up of each kind."""
SEED = 0
"""Of the noise of evaluations: whatever the run's seed, they differ in the weights alone."""

Predict = Callable[[nn.Module, PeptideBatch, Tensor, Tensor], ModelOutput]
"""(model, batch, noisy states [rows, L], timesteps [rows]) -> what the model says, with label and target told."""


@torch.no_grad()
def measure(
    predict: Predict,
    model: nn.Module,
    kernel: Kernel,
    loader: StatefulLoader[PeptideBatch],
    steps: int,
    sync_point: SyncPoint,
    balanced: bool = False,
) -> dict[str, float]:
    """Means over `steps` steps of a loader, every peptide at every timestep, the same on every rank. Collective.

    bound: nats per residue given the length, with prior and reconstruction; of each kind of peptides also. ce: as in
    training, with t uniform in 1..T. length: nats per peptide of its length given label and target. With `balanced`,
    they are those of as many peptides of each kind, whatever the numbers of both.
    """
    device = next(model.parameters()).device
    sums: dict[str, Tensor] = {
        f"{kind} {what}": torch.zeros((), dtype=torch.float64, device=device) for kind in KINDS for what in SUMS
    }
    for _ in range(steps):
        for batch in next_step(loader, sync_point, "evaluation"):
            _add(sums, predict, model, kernel, batch.to(device))
    totals = {name: float(value) for name, value in reduce_sums(sums, sync_point.topology, device).items()}
    weights = {kind: 1 / max(1.0, totals[f"{kind} peptides"]) if balanced else 1.0 for kind in KINDS}

    def mean(what: str, per: str) -> float:
        value, count = (sum(weights[kind] * totals[f"{kind} {name}"] for kind in KINDS) for name in (what, per))
        return value / count if count else 0.0

    found = {"bound": mean("nats", "residues"), "ce": mean("ce", "ce count"), "length": mean("length", "peptides")}
    for kind in KINDS:
        if totals[f"{kind} residues"]:
            found[f"bound/{kind}"] = totals[f"{kind} nats"] / totals[f"{kind} residues"]
    return found


def _add(sums: dict[str, Tensor], predict: Predict, model: nn.Module, kernel: Kernel, batch: PeptideBatch) -> None:
    x0, lengths, kept = batch.letters, batch.lengths, batch.weights.double()
    nats = kernel.prior_bound(x0, lengths).sum(-1, dtype=torch.float64)
    ce, ce_count = torch.zeros_like(nats), torch.zeros_like(nats)
    for timestep in range(1, kernel.T + 1):
        t = torch.full_like(lengths, timestep)
        xt = kernel.corrupt(x0, t, lengths, SEED, batch.domain, batch.draws)
        output = predict(model, batch, xt, t)
        terms = kernel.terms(output.logits, x0, xt, t, lengths)
        nats += terms.vb.sum(-1, dtype=torch.float64) / kernel.T
        ce += terms.ce.sum(-1, dtype=torch.float64)
        ce_count += kernel.counts(t, lengths).ce
    # A length that training never saw has no probability: an estimate that is infinite says nothing about a model.
    length = -output.log_lengths.gather(-1, lengths[:, None])[:, 0].double().clamp(min=-math.log(2) * 64)
    values = dict(zip(SUMS, (nats, lengths, ce, ce_count, length, torch.ones_like(nats)), strict=True))
    for kind, label in KINDS.items():
        mine = kept * (batch.labels == label)
        for name, value in values.items():
            sums[f"{kind} {name}"] += (value * mine).sum()


def summary(found: Mapping[str, float], sizes: MimirConfig, kernel: Kernel, measured: Peptides) -> dict[str, float]:
    """The numbers of an evaluation, of what `measure` has found of the peptides `measured`."""
    weight = loss_weights(sizes)
    least = floor_of(measured, sizes, kernel)
    head = found["length"] if sizes.length == "head" else 0.0
    return {
        "loss": weight.ce * found["ce"] + weight.vb * found["bound"] + head,
        "bound": found["bound"],
        "bits_per_residue": found["bound"] / math.log(2),
        "ce": found["ce"],
        "ce_floor": least.ce,
        "gap_to_floor": found["ce"] - least.ce,
        "entropy_of_residues": least.entropy,
        "length_nats": found["length"],
        **{name: value for name, value in found.items() if name.startswith("bound/")},
    }


def floor_of(peptides: Peptides, sizes: MimirConfig, kernel: Kernel) -> Floor:
    """The floor of peptides, both labels weighed as `measure` weighs them."""
    shares = compositions(peptides, len(sizes.letters))
    residues = shares.sum(-1)
    numbers = np.array([(peptides.labels == label).sum() for label in KINDS.values()])
    return floor(kernel, shares, residues / np.maximum(1, numbers) if sizes.balanced else residues)


def compositions(peptides: Peptides, letters: int) -> np.ndarray:
    """How often each letter stands in the peptides of each of KINDS, [kinds, letters] int64: a model that is told the
    label knows both."""
    rows = [peptides.labels == label for label in KINDS.values()]
    kinds = [dataclasses.replace(peptides, letters=peptides.letters[x], lengths=peptides.lengths[x]) for x in rows]
    return np.stack([composition(kind, letters) for kind in kinds])


def composition(peptides: Peptides, letters: int) -> np.ndarray:
    """How often each letter stands in peptides, [letters] int64."""
    inside = np.arange(peptides.letters.shape[1]) < peptides.lengths[:, None]
    return np.bincount(peptides.letters[inside], minlength=letters)
