"""What the memories are for: facts that the window no longer sees, within a document and in later ones.

`make accept NAME=neuromorphic` runs the recipe `neuromorphic_facts` as a user does, and reads its ablations and the
lifelong evaluation of its checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.callbacks.metrics import read_rows
from pipeline.recipes.neuromorphic import neuromorphic_facts
from pipeline.systems.neuromorphic.state import Uses
from tests.accept import KEPT
from tests.launch.harness import single
from tests.systems.neuromorphic.experiment import similarities, trained_on_facts

LEARNED, ABSENT = 0.9, 0.2
"""Least share of right answers with all memories, and greatest without the one that holds them; chance is 1/16."""
THREADS = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
Record = Callable[[str, Any], None]
WITHIN, LATER = "facts_right", "facts_right_later"


@pytest.mark.parametrize("lifelong", [False, True])
def test_written_rows_differ_after_200_spans_of_training(lifelong: bool) -> None:
    """The prototype's: .99998 of procedural, .98 of episodic memory. Where memories are lifelong, all 200 spans have
    written to them; else those of a document of three spans."""
    steps = 50
    state, model = trained_on_facts(Uses(lifelong=lifelong), "C" if lifelong else "B", steps=steps, batch=4)
    assert steps * neuromorphic_facts().sequence_length // model.span == 200
    written = (state.episodic.strengths > 0).sum(-1)
    assert written.min() >= (model.sizes.episodes if lifelong else model.sizes.candidates)
    found = similarities(state)
    assert len(found) == 4
    for name, cosine in found.items():
        assert cosine < 0.5, (name, found)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    kept = os.environ.get(KEPT)
    return Path(kept) if kept else tmp_path


def trained(run: Path, *flags: str) -> dict[str, dict[str, dict[str, float]]]:
    """Trains the recipe into a folder; the last ablations of each phase, by what is left out."""
    done = single("pipeline", "train", "neuromorphic_facts", *flags, "--output-dir", str(run), timeout=3600, **THREADS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in read_rows(run / "metrics.jsonl"):
        if row["mode"] == "ablate":
            found.setdefault(row["phase"], {})[row["without"]] = row
    return found


def recorded(record_property: Record, phase: str, found: dict[str, dict[str, float]], scalar: str, what: str) -> None:
    shares = ", ".join(f"{row[scalar]:.1%} without {name}" for name, row in found.items())
    record_property(f"right answers, phase {phase}, {what}", shares.replace(" without nothing", " all on"))


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
def test_facts_are_known_beyond_the_window_and_in_later_documents(folder: Path, record_property: Record) -> None:
    run = folder / "run"
    phases = trained(run)
    within, lifelong = phases["B"], phases["C"]
    recorded(record_property, "B", within, WITHIN, "of the same document")
    recorded(record_property, "C", lifelong, WITHIN, "of the same document")
    recorded(record_property, "C", lifelong, LATER, "of earlier documents")
    words = ("eval", str(run), "--suite", "lifelong", "--streams", "64", "--documents", "1,2,4")
    done = single("pipeline", *words, timeout=3600, **THREADS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    (written,) = (run / "evals").glob("*/lifelong/evaluation.json")
    rows = json.loads(written.read_text())["lifelong"]
    shortest = {row["documents"]: row["tokens"] for row in reversed(rows)}
    right: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["domain"] == rows[0]["domain"] and row["tokens"] == shortest[row["documents"]]:
            right.setdefault(row["memories"], {})[row["documents"]] = row["right"]
    for way, shares in right.items():
        shown = ", ".join(f"{share:.1%} after {documents}" for documents, share in shares.items())
        record_property(f"lifelong evaluation, {way}, by documents", shown)
    other = {row["documents"]: row["right"] for row in rows if row["domain"] != rows[0]["domain"]}
    record_property("lifelong evaluation, all on, after documents of another domain", other[max(other)])
    record_property("questions of a share, chance", [rows[0]["questions"], rows[0]["chance"]])
    print(json.dumps(phases, indent=1))

    assert within["nothing"][WITHIN] >= LEARNED
    assert within["PM and EM"][WITHIN] <= ABSENT
    assert min(lifelong["nothing"][WITHIN], lifelong["nothing"][LATER]) >= LEARNED
    assert lifelong["PM and EM"][WITHIN] <= ABSENT
    assert lifelong["EM"][LATER] <= ABSENT
    assert lifelong["own EM"][LATER] <= ABSENT
    assert min(right["all on"].values()) >= LEARNED
    assert max(max(right[way].values()) for way in ("EM off", "EM of another stream")) <= ABSENT


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_procedural_memory_alone_holds_a_fact(folder: Path, record_property: Record) -> None:
    """In phase A there is no episodic memory, and the question comes when the window no longer sees the fact."""
    found = trained(folder / "phase-a", "--phases", "A")["A"]
    recorded(record_property, "A", found, WITHIN, "of the same document")
    assert found["nothing"][WITHIN] >= LEARNED
    assert found["PM"][WITHIN] <= ABSENT
    assert found["own PM"][WITHIN] <= ABSENT
