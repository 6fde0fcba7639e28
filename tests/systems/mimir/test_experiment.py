"""The claims of discrete diffusion over peptides, on a process that is known exactly."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import nn

from pipeline.inference.drawing import find_drawer
from pipeline.inference.trained import load_trained
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.systems.mimir.data.encode import decode
from pipeline.systems.mimir.data.process import Process, read_process
from pipeline.systems.mimir.evaluation.likelihoods import likelihoods
from pipeline.systems.mimir.evaluation.rows import Rows
from pipeline.systems.mimir.peptides import BACKGROUND, INTERACTING, NO_TARGET, Peptides, chosen, some
from pipeline.systems.mimir.sampling.options import PeptideOptions
from pipeline.systems.mimir.system import MimirSystem
from tests.launch.harness import single

CORES = str(len(os.sched_getaffinity(0)))
LONGEST = 600
"""Seconds of both tests together, on two cores."""
KINDS = {"interacting": INTERACTING, "background": BACKGROUND}
ASKED, SCORED = 8, 1000
"""Trained targets whose samples are looked at; peptides of each label whose bound is measured."""
# Masks are taken off one residue at a time, so that the bound of a perfect denoiser is the entropy itself.
FLAGS = (
    "--model.width", "64", "--model.kernel", "absorbing", "--model.timesteps", "20", "--lr", "3e-3", "--warmup-steps",
    "100", "--epochs.train", "0", "--epochs.evaluate", "0", "--epochs.save", "0", "--data.holdout", "0.05",
    "--report.log-every", "50",
)  # fmt: skip

Record = Callable[[str, Any], None]
seconds: list[float] = []
"""Of each test."""


class Trained(NamedTuple):
    """A run, and the process of its data."""

    folder: Path
    system: MimirSystem
    model: nn.Module
    process: Process

    def sequences(self, number: int, **options: Any) -> list[str]:
        few = PeptideOptions(number, unique=False, likelihood=0, novelty=False, dtype="float32", **options)
        return [str(row["sequence"]) for row in self.system.draw(self.model, few).rows]

    def excess(self, peptides: Peptides) -> float:
        """By what share of it the bound of peptides of one label is above -log p by the process."""
        nats = likelihoods(Rows(self.system, self.model, SyncPoint(Topology()), 256), peptides, "test").nats.sum()
        texts = decode(peptides.letters, peptides.lengths, self.system.sizes.letters)
        names = self.system.peptides.target_names
        pairs = zip(texts, peptides.labels.tolist(), peptides.targets.tolist(), strict=True)
        exact = -sum(self.process.log_probability(text, label, names[target] if label else "")
                     for text, label, target in pairs)  # fmt: skip
        return float(nats) / exact - 1

    def fresh(self, label: int) -> Peptides:
        """New peptides of the process, of the targets that training has."""
        generator, count = np.random.Generator(np.random.PCG64(5)), SCORED
        data = self.system.peptides
        targets = generator.integers(0, data.training_targets, count) if label else np.full(count, NO_TARGET)
        places = [self.process.target_names.index(data.target_names[target]) if label else -1 for target in targets]
        texts = self.process.draw(np.full(count, label), np.array(places), generator)
        letters = np.zeros((count, self.system.sizes.max_length), np.uint8)
        for row, text in zip(letters, texts, strict=True):
            row[: len(text)] = [self.system.sizes.letters.index(letter) for letter in text]
        return Peptides(letters, np.array(list(map(len, texts)), np.uint8), np.full(count, label, np.int8), targets)


def mnemos(*words: str) -> None:
    done = single("pipeline", *words, timeout=3600, OMP_NUM_THREADS=CORES)
    assert done.returncode == 0, done.stderr


def trained(folder: Path, *flags: str, count: int, targets: int) -> Trained:
    data, run = folder / "set.csv", folder / "run"
    mnemos(
        "data", "synth", "mimir", "--out", str(data), "--count", str(count), "--targets", str(targets), "--places", "2"
    )
    mnemos("train", "mimir_small", "--output-dir", str(run), "--data.path", str(data), *FLAGS, *flags)
    drawer = find_drawer(run)
    assert drawer is not None and isinstance(drawer.system, MimirSystem)
    model = load_trained(drawer.checkpoint, drawer.config, drawer.system).model
    return Trained(run, drawer.system, model, read_process(folder / "set.process.json"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_trained_model_has_the_entropy_and_the_motifs_of_the_process(tmp_path: Path, record_property: Record) -> None:
    begun = time.perf_counter()
    run = trained(tmp_path, "--steps", "800", "--model.held-out-peptides", "2000", count=40_000, targets=32)
    excess = {}
    for kind, label in KINDS.items():
        held_out = run.system.peptides.held_out
        excess[kind] = run.excess(run.fresh(label))
        excess[f"{kind}, held out"] = run.excess(some(chosen(held_out, held_out.labels == label), SCORED))
        record_property(f"entropy of the process, {kind}", round(run.process.entropy_per_residue(label), 4))
    for kind, share in excess.items():
        record_property(f"bound above the entropy, {kind}", f"{100 * share:.1f} %")
    names = run.system.peptides.target_names[: min(ASKED, run.system.peptides.training_targets)]
    drawn = {name: run.sequences(100, target=name) for name in names}

    def holds(name: str, other: str) -> float:
        return sum(run.process.motif_of(name) in sequence for sequence in drawn[other]) / len(drawn[other])

    own = [holds(name, name) for name in names]
    others = [holds(name, other) for name in names for other in names if other != name]
    record_property("samples with their target's motif", f"{100 * np.mean(own):.1f} % (least {100 * min(own):.0f} %)")
    record_property("with another's", f"{100 * np.mean(others):.2f} % (most {100 * max(others):.0f} %)")
    one, again = (run.sequences(1000, min_length=8, max_length=20) for _ in range(2))
    another = run.sequences(1000, min_length=8, max_length=20, seed=1)
    record_property("different peptides of 1,000", len(set(one)))
    of_target = run.sequences(1000, target=names[0], interacting=True, min_length=8, max_length=20)
    record_property("different peptides of 1,000 for one target", len(set(of_target)))
    seconds.append(time.perf_counter() - begun)
    record_property("seconds", round(seconds[-1]))
    assert max(excess.values()) < 0.05
    assert np.mean(own) >= 0.8 and max(others) <= 0.05
    assert one == again and one != another
    assert len(set(one)) >= 950 and len(set(of_target)) >= 950


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_targets_that_training_never_saw_are_told_by_their_sequences(tmp_path: Path, record_property: Record) -> None:
    begun = time.perf_counter()
    flags = ("--model.target", "encoder", "--model.target-file", str(tmp_path / "set.targets.fasta"))
    run = trained(tmp_path, *flags, "--steps", "800", "--model.held-out-peptides", "1000", count=40_000, targets=200)
    mnemos("eval", str(run.folder), "--suite", "peptides", "--samples", "200", "--peptides", "200", "--decoys", "4")
    (written,) = run.folder.glob("evals/*/peptides/evaluation.json")
    rows = {(row["measure"], row["of"]): row for row in json.loads(written.read_text())["measures"]}
    for measure in ("target AUROC", "target AUROC within a peptide", "true target first", "target recovered"):
        row = rows[measure, "unseen targets"]
        record_property(
            f"{measure}, unseen targets",
            f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f}; {row['beside_is']} {row['beside']:.3f})",
        )
    seconds.append(time.perf_counter() - begun)
    record_property("seconds with unseen targets", round(seconds[-1]))
    assert rows["target AUROC", "unseen targets"]["low"] > 0.5
    assert rows["target AUROC within a peptide", "unseen targets"]["low"] > 0.5
    assert sum(seconds) < LONGEST
