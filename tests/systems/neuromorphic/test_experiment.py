"""What the memories are for: facts that the window no longer sees, within a document and in later ones."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from pipeline.systems.neuromorphic.state import Uses
from tests.systems.neuromorphic import experiment
from tests.systems.neuromorphic.experiment import LATER, ONE, WITHIN, right_answers, train

LEARNED, ABSENT = 0.9, 0.2
"""Least share of right answers with all memories, and greatest without the one that holds them; chance is 1/16."""
LIFELONG = Uses(lifelong=True)


@pytest.mark.parametrize("lifelong", [False, True])
def test_written_rows_differ_after_200_spans_of_training(lifelong: bool) -> None:
    """The prototype's: .99998 of procedural, .98 of episodic memory. Where memories are lifelong, all 200 spans have
    written to them; else those of a document of three spans."""
    sizes = experiment.config()
    model = experiment.new_model(sizes)
    task, uses = (LATER, LIFELONG) if lifelong else (WITHIN, Uses())
    state, steps = train(model, task, uses, most=50, batch=4, restart=1000)
    assert steps * experiment.LENGTH // experiment.SPAN == 200
    written = (state.episodic.strengths > 0).sum(-1)
    assert written.min() >= (sizes.sizes.episodes if lifelong else sizes.sizes.candidates)
    found = experiment.similarities(state)
    assert len(found) == 4
    for name, cosine in found.items():
        assert cosine < 0.5, (name, found)


@pytest.mark.slow
def test_facts_are_told_beyond_the_window_and_in_later_documents(record_property) -> None:
    begun = time.monotonic()
    model = experiment.new_model(experiment.config())
    # From one fact on: among many, what is read is about another one at first, and says nothing.
    for task, name in ((ONE, "one fact"), (WITHIN, "three facts")):
        _, steps = train(model, task, Uses(), most=600, enough=0.97)
        record_property(f"steps, {name}", steps)
    empty = Uses(procedural="empty", episodic="empty")
    ways = {
        "all": Uses(), "without both": empty,
        "without episodic": Uses(episodic="empty"), "without procedural": Uses(procedural="empty"),
    }  # fmt: skip
    within = {name: right_answers(model, WITHIN, uses)[0] for name, uses in ways.items()}

    _, steps = train(model, LATER, LIFELONG, most=500, enough=0.95)
    record_property("steps, lifelong", steps)
    ways = {name: dataclasses.replace(uses, lifelong=True) for name, uses in ways.items()}
    found = {name: right_answers(model, LATER, uses) for name, uses in ways.items()}
    found["swapped"] = right_answers(model, LATER, LIFELONG, swapped="episodic")
    seconds = time.monotonic() - begun
    for name, share in within.items():
        record_property(f"right within a document, {name}", round(share, 3))
    for name, (same, later) in found.items():
        record_property(f"right within a document, lifelong, {name}", round(same, 3))
        record_property(f"right in later documents, {name}", round(later, 3))
    record_property("seconds", round(seconds))
    print(within, found, f"{seconds:.0f} s on {torch.get_num_threads()} threads")

    assert within["all"] >= LEARNED
    assert within["without both"] <= ABSENT
    assert min(found["all"]) >= LEARNED
    assert found["without both"][0] <= ABSENT
    assert found["without episodic"][1] <= ABSENT
    assert found["swapped"][1] <= ABSENT


@pytest.mark.slow
def test_procedural_memory_alone_holds_a_fact(record_property) -> None:
    """In phase A there is no episodic memory, and the question comes when the window no longer sees the fact."""
    begun = time.monotonic()
    model, uses = experiment.new_model(experiment.config()), experiment.PHASE_A
    state, steps = train(model, ONE, uses, most=600, enough=0.95)
    found = {
        "all": right_answers(model, ONE, uses)[0],
        "without procedural": right_answers(model, ONE, dataclasses.replace(uses, procedural="empty"))[0],
        "procedural of another stream": right_answers(model, ONE, uses, swapped="procedural")[0],
    }
    seconds = time.monotonic() - begun
    for name, share in found.items():
        record_property(f"right within a document, phase A, {name}", round(share, 3))
    strengths = state.procedural.strengths.sum(-1).mean().item()
    record_property("steps, phase A", steps)
    record_property("sum of the strengths of procedural slots", round(strengths, 4))
    record_property("seconds, phase A", round(seconds))
    print(found, f"strengths {strengths:.4f}", f"{seconds:.0f} s on {torch.get_num_threads()} threads")

    assert found["all"] >= LEARNED
    assert found["without procedural"] <= ABSENT
    assert found["procedural of another stream"] <= ABSENT
