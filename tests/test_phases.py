"""Which phases a run is made of, where it goes on, and what is known of each parameter there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.compatibility import phase_to_run
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.load import model_without_storage
from pipeline.phases import Phases, pick
from pipeline.run import Progress
from pipeline.system import ParameterGroup, Phase
from tests import toy_systems
from tests.toy_systems.phased import phased


def phase(name: str, *groups: str, steps: int = 5) -> Phase:
    """A phase of groups of one-letter parameters."""
    return Phase(name, steps, tuple(ParameterGroup(f"group {group}", tuple(group)) for group in groups))


ABC = (phase("A", "pq", "r"), phase("B", "qs"), phase("C", "pqst"))


def config(**changes: Any) -> RunConfig:
    return dataclasses.replace(phased(Path("out")), **changes)


def test_a_parameter_is_fresh_dropped_or_at_rest_by_the_phases_alone() -> None:
    a, b, c = (Phases(ABC, index, trained=tuple("pqrst")) for index in range(3))
    assert [phases.fresh for phases in (a, b, c)] == [set("pqr"), {"s"}, set("pt")]
    assert [phases.dropped for phases in (a, b, c)] == [set(), set("pr"), set()]
    assert [phases.at_rest for phases in (a, b, c)] == [set("st"), set("prt"), {"r"}]
    assert [phases.before for phases in (a, b, c)] == [(), ("A",), ("A", "B")]


def test_a_group_is_split_where_its_parameters_have_seen_other_numbers_of_updates() -> None:
    assert Phases(ABC).current == ABC[0]
    groups = [(group.name, group.parameters) for group in Phases(ABC, 1).current.groups]
    assert groups == [("group qs since A", ("q",)), ("group qs since B", ("s",))]
    groups = [(group.name, group.parameters) for group in Phases(ABC, 2).current.groups]
    # p rested in B: its moments of A were dropped there.
    assert groups == [
        ("group pqst since A", ("q",)), ("group pqst since B", ("s",)), ("group pqst since C", ("p", "t")),
    ]  # fmt: skip


def test_a_split_group_keeps_its_settings() -> None:
    group = ParameterGroup("all", ("p", "q"), lr_scale=0.5, weight_decay=0.1)
    phases = Phases((phase("A", "p"), Phase("B", 5, (group,))), 1)
    assert {(part.lr_scale, part.weight_decay) for part in phases.current.groups} == {(0.5, 0.1)}


def test_no_steps_are_of_one_phase_whose_length_is_steps() -> None:
    nothing = config(steps=0)
    assert pick(nothing, [phase("A", "p", steps=0)]) == (phase("A", "p", steps=0),)
    for phases, named in (
        ([phase("A", "p", steps=0), phase("B", "p", steps=0)], r"A \(0 steps\), B \(0 steps\): give a number of steps"),
        ([phase("A", "p", steps=5)], r"A \(5 steps\): give a number of steps"),
    ):
        with pytest.raises(UserError, match=named):
            pick(nothing, phases)


def test_a_run_goes_on_to_what_follows_unless_one_phase_was_asked_for() -> None:
    assert [phase.name for phase in Phases(ABC, 0).after] == ["B", "C"]
    assert Phases(ABC, 0, alone=True).after == ()


def test_phases_are_picked_in_their_order() -> None:
    assert pick(config(), ABC) == ABC
    assert pick(config(phases=("A", "C")), ABC) == (ABC[0], ABC[2])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"phases": ("A", "D")}, "--phases 'D': not a phase of phased_tiny: it has A, B, C"),
        ({"phase": "D"}, "--phase 'D': not a phase of phased_tiny: it has A, B, C"),
        ({"phases": ("C", "A")}, "--phases C A: phases follow each other as A, B, C: give each once, in this order"),
        ({"phases": ("A", "A")}, "--phases A A: phases follow each other as A, B, C: give each once, in this order"),
        ({"phases": ("A", "B"), "phase": "C"}, "--phase C: --phases leaves it out"),
    ],
)
def test_phases_that_cannot_be_picked_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        pick(config(**changes), ABC)
    assert str(error.value).startswith(message)


def inside(name: str, *before: str, steps: int = 2, start: int = 10, done: bool = False) -> Progress:
    return Progress(start + steps, name, phase_start=start, phase_done=done, phases_before=before)


@pytest.mark.parametrize(
    "progress, wanted, index",
    [
        (None, None, 0),
        (None, "A", 0),
        (inside("A", start=0), None, 0),
        (inside("A", start=0), "A", 0),
        (inside("A", start=0, done=True), None, 1),
        (inside("A", start=0, steps=5, done=True), "B", 1),
        (inside("A", start=0, done=True), "A", 0),
        (inside("B", "A"), None, 1),
        (inside("B", "A"), "B", 1),
        (inside("B", "A", steps=5, done=True), None, 2),
        (inside("C", "A", "B", steps=5, done=True), None, 2),
    ],
)
def test_a_start_goes_on_where_the_checkpoint_was(progress: Progress | None, wanted: str | None, index: int) -> None:
    assert phase_to_run(config(phase=wanted), ABC, progress, "checkpoint-12") == index


@pytest.mark.parametrize(
    "progress, changes, message",
    [
        (None, {"phase": "B"}, "--phase B: it goes on from the checkpoint that ended A"),
        (inside("A", start=0), {"phase": "B"}, "checkpoint-12 is inside A, at step 2 of it, and --phase B needs one"),
        (
            inside("A", start=0, done=True),
            {"phase": "C"},
            "checkpoint-12 ended A, and --phase C needs one",
        ),
        (inside("C", "A", "B"), {"phase": "A"}, "checkpoint-12 is inside C, at step 2 of it, and A is the first"),
        (inside("D", "A"), {}, "checkpoint-12 is of a run of the phases A D, this one has A B C"),
        (inside("B"), {}, "checkpoint-12 is of a run of the phases B, this one has A B C"),
        (inside("C", "A"), {}, "checkpoint-12 is of a run of the phases A C, this one has A B C"),
    ],
)
def test_a_checkpoint_from_which_the_phase_cannot_begin_is_refused(
    progress: Progress | None, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        phase_to_run(config(**changes), ABC, progress, "checkpoint-12")
    assert str(error.value).startswith(message)


def test_progress_counts_through_the_run_and_in_the_phase() -> None:
    progress = Progress(phase="A")
    progress.step, progress.phase_done = 4, True
    assert progress.phase_step == 4
    progress.enter("B")
    progress.step = 6
    assert (progress.phase_step, progress.phase_start, progress.phase_done) == (2, 4, False)
    assert (progress.phases_before, progress.phase_ends) == (("A",), (4,))


def test_a_system_of_the_tests_has_these_phases() -> None:
    """What the launches train: in its last phase a group is of three ages."""
    toy_systems.add()
    found = tuple(model_without_storage(config()).phases)
    last = Phases(found, 2).current
    assert [len(group.parameters) for group in last.groups] == [1, 1, 2]
