"""`eval --suite peptides`: all measures of a model, as a table and as pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from pipeline.evaluation_result import Curve, Evaluation, Row
from pipeline.heat_map import HeatMap
from pipeline.parallel.collectives import shared_errors
from pipeline.runtime.sync import SyncPoint
from pipeline.systems.mimir.data.encode import decode
from pipeline.systems.mimir.evaluation import measures, pictures
from pipeline.systems.mimir.evaluation.bits import bits_per_residue
from pipeline.systems.mimir.evaluation.distances import Distance
from pipeline.systems.mimir.evaluation.drawing import draw_like, targets_of
from pipeline.systems.mimir.evaluation.held_out import HeldOut, by_cluster, by_target
from pipeline.systems.mimir.evaluation.likelihoods import Likelihoods, decoys, likelihoods, target_ratios
from pipeline.systems.mimir.evaluation.ranking import rank
from pipeline.systems.mimir.evaluation.recovery import KmerClassifier, recovery
from pipeline.systems.mimir.evaluation.rows import Rows
from pipeline.systems.mimir.held_out import KINDS, composition
from pipeline.systems.mimir.peptides import INTERACTING, NO_TARGET, Peptides, PeptideSet, chosen, some
from pipeline.systems.mimir.sampling.batch import Predicts
from pipeline.systems.mimir.sampling.nearest import nearest

UNSEEN = "unseen targets"
"""The kind of peptides whose targets training has nothing of."""
NEAREST = 500
"""Peptides of each kind whose nearest training peptide is looked for."""
CLASSIFIED = 200_000
"""Training peptides of which a classifier learns at the most."""
BATCH_SIZE = 256


class Evaluates(Predicts, Protocol):
    """What the suite needs of the system."""

    @property
    def peptides(self) -> PeptideSet: ...


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    samples: int = 1000
    """Peptides of each kind that are drawn."""
    peptides: int = 1000
    """Held-out peptides of each kind that are scored at the most."""
    decoys: int = 9
    """Other targets beside the true one of each."""
    guidance: float = 1.0
    temperature: float = 1.0
    seed: int = 0
    """Of what is drawn."""


class PeptideSuite:
    """One evaluation: the kinds of peptides that there are, and what is found of them."""

    def __init__(self, system: Evaluates, model: nn.Module, sync_point: SyncPoint, options: Options) -> None:
        self.system, self.options, self.data = system, options, system.peptides
        self.rows = Rows(system, model, sync_point, BATCH_SIZE)
        self.letters = len(system.sizes.letters)
        held_out = {
            kind: chosen(self.data.held_out, self.data.held_out.labels == label) for kind, label in KINDS.items()
        }
        if system.sizes.target == "encoder":
            held_out[UNSEEN] = self.data.held_out_targets
        most = max(options.peptides, options.samples)
        with shared_errors(sync_point.topology):
            # Of all that is held out: few of a cluster need not be near each other.
            self.held_out = {
                kind: (by_target(found) if kind == UNSEEN else by_cluster(found, system.sizes.letters)).some(most)
                for kind, found in held_out.items()
                if len(found)
            }
        self.table: list[Row] = []
        self.curves: dict[str, Curve] = {}
        self.heat_maps: dict[str, HeatMap] = {}

    def run(self) -> Evaluation:
        self.score()
        self.rank()
        drawn = {
            kind: draw_like(
                self.rows, found.peptides, self.options.samples, kind, guidance=self.options.guidance,
                temperature=self.options.temperature, seed=self.options.seed,
            )
            for kind, found in self.held_out.items()
        }  # fmt: skip
        self.describe(drawn)
        self.recover(drawn)
        self.curves["recovery"] = pictures.recovery_curve(self.table)
        texts = {kind: self.texts(found)[:100] for kind, found in drawn.items()}
        return Evaluation({}, self.curves, {"drawn": texts}, self.heat_maps, {"measures": self.table})

    def texts(self, peptides: Peptides) -> list[str]:
        return decode(peptides.letters, peptides.lengths, self.system.sizes.letters)

    def score(self) -> None:
        """Bounds and cross-entropies of held-out peptides."""
        found: dict[str, tuple[Likelihoods, HeldOut]] = {}
        kernel = self.system.kernel
        floors, entropies, residues = [], [], []
        for kind, every in self.held_out.items():
            # Of the kind: the model is told the label.
            shares = composition(every.peptides, self.letters).astype(np.float64)
            frequencies = torch.from_numpy(shares / shares.sum())
            floors.append(kernel.cross_entropy_floors(frequencies).numpy())
            entropy = float(torch.special.entr(frequencies).sum()) / math.log(2)
            entropies.append(entropy)
            residues.append(shares.sum())
            held_out = every.some(self.options.peptides)
            one = likelihoods(self.rows, held_out.peptides, kind)
            found[kind] = (one, held_out)
            bits = bits_per_residue(one.nats, held_out.peptides.lengths, held_out.groups)
            self.table.append(measures.row("bits per residue", kind, bits, entropy, "independent residues"))
            ce = float(one.ce.sum() / one.counts.sum())
            self.table.append(measures.row("cross-entropy, nats", kind, ce, float(floors[-1].mean()), "floor"))
        mean = float(np.average(entropies, weights=residues))
        self.curves["bits_by_length"] = pictures.bits_by_length(found, mean)
        self.curves["cross_entropy_by_timestep"] = pictures.cross_entropy_by_timestep(
            {kind: one for kind, (one, _) in found.items()}, np.average(floors, axis=0, weights=residues)
        )

    def rank(self) -> None:
        """True targets among decoys: of the trained ones, and of those that training has nothing of."""
        ratios = {}
        every = (self.data.training, self.data.held_out, self.data.held_out_targets)
        known = Peptides(
            *(np.concatenate([getattr(part, name) for part in every]) for name in Peptides.__annotations__)
        )
        for kind in ("interacting", UNSEEN):
            if kind not in self.held_out:
                continue
            held_out = self.held_out[kind].some(self.options.peptides)
            held_out = held_out[held_out.peptides.targets >= 0]
            seen = np.arange(self.data.training_targets)
            unseen = np.arange(self.data.training_targets, len(self.data.target_names))
            candidates = decoys(held_out.peptides, known, unseen if kind == UNSEEN else seen, self.options.decoys)
            several = (candidates[:, 1:] != NO_TARGET).any(1)
            if not several.any():
                continue
            held_out, candidates = held_out[several], candidates[several]
            ratios[kind] = target_ratios(self.rows, held_out.peptides, candidates, kind)
            self.table += measures.ranking_rows(kind, rank(ratios[kind], held_out.groups))
        if ratios:
            self.curves["target_roc"] = pictures.roc_curve(ratios)

    def describe(self, drawn: dict[str, Peptides]) -> None:
        """What is drawn beside what is held out."""
        sizes, training = self.system.sizes, self.texts(self.data.training)
        known = set(training)
        sets, texts, edits = {}, {}, {}
        distances: dict[str, dict[str, Distance]] = {}
        for kind, peptides in drawn.items():
            held_out = self.held_out[kind]
            mine, theirs = self.texts(peptides), self.texts(held_out.peptides)
            self.table += measures.quality(kind, mine, theirs, known, sizes.min_length, sizes.max_length)
            distances[kind] = measures.distances(peptides, held_out, self.letters)
            self.table += measures.distance_rows(kind, distances[kind])
            for name, found, words in (("drawn", peptides, mine), ("held out", held_out.peptides, theirs)):
                sets[f"{kind}, {name}"], texts[f"{kind}, {name}"] = found, words
                edits[f"{kind}, {name}"] = nearest(words[:NEAREST], training)[0]
        self.curves["residues"] = pictures.compositions(
            {f"{kind}, drawn": found for kind, found in drawn.items()},
            {f"{kind}, held out": self.held_out[kind] for kind in drawn},
            sizes.letters,
        )
        self.curves["lengths"] = pictures.length_shares(sets, sizes.min_length, sizes.max_length)
        self.curves["distances"] = pictures.distance_curve(distances)
        self.curves["uniqueness"] = pictures.uniqueness_curve(texts)
        self.curves["nearest"] = pictures.nearest_curve(edits)
        self.curves["quality"] = pictures.quality_curve(self.table)

    def recover(self, drawn: dict[str, Peptides]) -> None:
        """Label and target by classifiers of real peptides: of training, and of unseen targets by what is held out."""
        training = some(self.data.training, CLASSIFIED)
        if all(kind in drawn for kind in KINDS) and len(np.unique(training.labels)) == len(KINDS):
            classifier = KmerClassifier(training, training.labels.astype(np.int64), self.letters)
            held_out = {kind: self.held_out[kind].peptides for kind in KINDS}
            first, second = (self.held_out[kind].groups for kind in KINDS)
            groups = np.concatenate([first, second + first.max() + 1])
            found = []
            for sets, together in ((drawn, None), (held_out, groups)):
                scores = np.concatenate([classifier.scores(sets[kind]) for kind in KINDS])
                labels = np.concatenate([sets[kind].labels for kind in KINDS]).astype(np.int64)
                found.append(recovery(scores, labels, together))
            self.table += measures.recovery_rows("label", "both labels", found[0], found[1])
        interacting = some(chosen(self.data.training, self.data.training.labels == INTERACTING), CLASSIFIED)
        self._recover_targets("interacting", interacting, drawn)
        # There is nothing else to learn these targets from; the classifier's own peptides are then no measure of it.
        self._recover_targets(UNSEEN, self.data.held_out_targets, drawn)

    def _recover_targets(self, kind: str, real: Peptides, drawn: dict[str, Peptides]) -> None:
        targets = targets_of(real)
        if kind not in drawn or len(targets) < 2:
            return
        real = chosen(real, real.targets >= 0)
        classifier = KmerClassifier(real, np.searchsorted(targets, real.targets), self.letters)

        def scored(peptides: Peptides) -> tuple[np.ndarray, np.ndarray]:
            return classifier.scores(peptides), np.searchsorted(targets, peptides.targets)

        scores, classes = scored(chosen(drawn[kind], np.isin(drawn[kind].targets, targets)))
        found = recovery(scores, classes)
        if kind == UNSEEN:
            self.table.append(
                measures.row("target recovered", kind, found.recovered, found.shuffled, "shuffled", found.upper)
            )
        else:
            held_out = self.held_out[kind]
            held_out = held_out[np.isin(held_out.peptides.targets, targets)]
            other = recovery(*scored(held_out.peptides), held_out.groups)
            self.table += measures.recovery_rows("target", kind, found, other)
        names = [self.data.target_names[target] for target in targets]
        if len(classes):
            self.heat_maps[f"targets_{kind.split()[0]}"] = pictures.target_map(scores, classes, names)
