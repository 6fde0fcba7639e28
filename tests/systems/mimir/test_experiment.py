"""The claims of discrete diffusion over peptides, on a process that is known exactly."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.callbacks.metrics import read_rows
from pipeline.inference.drawing import find_drawer
from pipeline.inference.trained import load_trained
from pipeline.systems.mimir.data.process import Process, read_process
from pipeline.systems.mimir.peptides import BACKGROUND, INTERACTING
from pipeline.systems.mimir.sampling.options import PeptideOptions
from pipeline.systems.mimir.system import MimirSystem
from tests.launch.harness import single

CORES = str(len(os.sched_getaffinity(0)))
LONGEST = 600
"""Seconds of all that is trained, drawn and measured, on two cores."""
COUNT, TARGETS, HOLDOUT = 60_000, 200, 0.05
TRAINING = (
    "--model.width", "64", "--model.timesteps", "25", "--model.target", "encoder", "--lr", "3e-3",
    "--warmup-steps", "100", "--epochs.train", "0", "--steps", "1200", "--epochs.evaluate", "0", "--epochs.save", "0",
    "--evaluation.steps", "8", "--data.holdout", str(HOLDOUT), "--report.log-every", "50",
)  # fmt: skip
ASKED = 8
"""Targets whose samples are looked at, of those that training has."""


def mnemos(*words: str) -> None:
    done = single("pipeline", *words, timeout=3600, OMP_NUM_THREADS=CORES)
    assert done.returncode == 0, done.stderr


def holds(process: Process, target: str, sequences: list[str]) -> float:
    """The share of sequences with a target's motif."""
    motif = process.motif_of(target)
    return sum(motif in sequence for sequence in sequences) / len(sequences)


@pytest.mark.slow
def test_motifs_entropy_and_unseen_targets_in_ten_minutes(
    tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    begun = time.perf_counter()
    data, run = tmp_path / "set.csv", tmp_path / "run"
    mnemos("data", "synth", "mimir", "--out", str(data), "--count", str(COUNT), "--targets", str(TARGETS))
    files = ("--data.path", str(data), "--model.target-file", str(tmp_path / "set.targets.fasta"))
    mnemos("train", "mimir_small", "--output-dir", str(run), *files, *TRAINING)
    mnemos("eval", str(run), "--suite", "peptides", "--samples", "1000", "--peptides", "300", "--decoys", "4")
    (written,) = run.glob("evals/*/peptides/evaluation.json")
    found = json.loads(written.read_text())
    rows = {(row["measure"], row["of"]): row for row in found["measures"]}
    process = read_process(tmp_path / "set.process.json")
    excess = {}
    for of, label in (("interacting", INTERACTING), ("background", BACKGROUND)):
        entropy = process.entropy_per_residue(label) / math.log(2)
        excess[of] = rows["bits per residue", of]["value"] / entropy - 1
        record_property(f"bound above the entropy, {of}", f"{100 * excess[of]:.1f} %")
    drawer = find_drawer(run)
    assert drawer is not None and isinstance(drawer.system, MimirSystem)
    system = drawer.system
    model = load_trained(drawer.checkpoint, drawer.config, system).model

    def sequences(number: int, **options: Any) -> list[str]:
        few = PeptideOptions(number, unique=False, likelihood=0, novelty=False, dtype="float32", **options)
        return [str(row["sequence"]) for row in system.draw(model, few).rows]

    names = system.peptides.target_names[: min(ASKED, system.peptides.training_targets)]
    drawn = {name: sequences(100, target=name) for name in names}
    own = sum(holds(process, name, drawn[name]) for name in names) / len(names)
    others = [holds(process, name, drawn[other]) for name in names for other in names if other != name]
    record_property("a target's motif in its own samples", f"{100 * own:.1f} %")
    record_property("in those of others", f"{100 * sum(others) / len(others):.2f} %")
    unseen = rows["target AUROC within a peptide", "unseen targets"]
    record_property("AUROC of unseen targets", f"{unseen['value']:.3f} ({unseen['low']:.3f} to {unseen['high']:.3f})")
    one, again = (sequences(1000, min_length=8, max_length=20) for _ in range(2))
    other = sequences(1000, min_length=8, max_length=20, seed=1)
    record_property("different peptides of 1,000", len(set(one)))
    last = [row for row in read_rows(run / "metrics.jsonl") if row["mode"] == "val"][-1]
    record_property("gap to the floor of cross-entropy, nats", round(last["gap_to_floor"], 4))
    seconds = time.perf_counter() - begun
    record_property("seconds", round(seconds))
    assert max(excess.values()) < 0.05
    assert own >= 0.8 and max(others) <= 0.05
    assert unseen["low"] > 0.5
    assert one == again and one != other
    assert len(set(one)) >= 950
    assert seconds < LONGEST
