"""A run of three phases: what plain PyTorch gives, whatever the ranks and stages, and however often it is stopped."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.launch.forked import forked

SINGLE, SHARDED = 1e-6, 1e-5


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What held on two ranks and on one."""
    out = tmp_path_factory.mktemp("phases")
    done = forked(2, "tests.launch.phases_main", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    done = forked(1, "tests.launch.phases_main", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return {world: json.loads((out / f"result-{world}.json").read_text()) for world in (1, 2)}


def of(found: dict[str, Any], kind: str) -> dict[str, Any]:
    return {case: value for case, value in found.items() if case.startswith(kind)}


@pytest.mark.timeout(600)
def test_losses_rates_and_weights_are_those_of_plain_adamw_on_named_sets(found) -> None:
    errors = {f"{case} on {world}": error for world in (1, 2) for case, error in of(found[world], "error").items()}
    assert len(errors) == 4 + 8 + 2 + 4 + 1
    assert {
        case: error
        for case, error in errors.items()
        if error > (SINGLE if case.endswith("on 1") and "elastic" not in case else SHARDED)
    } == {}


def test_each_phase_is_evaluated_as_it_ends(found) -> None:
    evaluated = {**of(found[1], "evaluated"), **of(found[2], "evaluated")}
    assert len(evaluated) == 8 and all(evaluated.values())


@pytest.mark.parametrize("world", [1, 2])
def test_stops_before_at_and_behind_the_switches_cost_no_bit(found, world: int) -> None:
    stopped = of(found[world], "stopped")
    assert len(stopped) == {1: 2, 2: 3}[world] and {case: wrong for case, wrong in stopped.items() if wrong} == {}


def test_a_phase_that_ended_unevaluated_is_evaluated_by_the_next_start(found) -> None:
    assert found[1]["died unevaluated"] == []


def test_samples_and_ablations_come_at_their_intervals_and_at_ends(found) -> None:
    done = found[1]["intervals"]
    ends, last = done["ends"], done["ends"][-1]
    assert done["sampled"] == sorted({*range(2, last + 1, 2), *ends})
    assert done["ablated"] == sorted({*range(3, last + 1, 3), *ends})
    first, _, second, _ = ends
    phases = {step: "A" if step <= first else "B" if step <= second else "C" for step in range(1, last + 1)}
    assert done["rows"] == [[step, phases[step], "late bias"] for step in done["ablated"]]
    # A rule is asked after every step, and a logged step is one of the interval, or the last of a phase or a start.
    assert done["logged"] == [[step, step != first] for step in sorted({*range(3, last + 1, 3), *ends})]
    assert done["texts"] == {f"drawn-{step}.txt": f"{phases[step]} {step}\n" for step in done["sampled"]}


def test_a_phase_may_end_by_an_evaluation_wherever_a_start_stops(found) -> None:
    ended = found[1]["ended by an evaluation"]
    assert ended["rows"] == [["A", step] for step in range(1, 5)] + [["B", step] for step in range(1, 6)]
    assert ended["differs"] == []


def test_phases_run_one_by_one_give_the_same_bits(found) -> None:
    assert found[1]["one by one"] == []


def test_a_phase_does_not_begin_in_the_midst_of_another(found) -> None:
    assert "is inside A, at step 2 of it" in found[1]["refused B"] and "--phase B" in found[1]["refused B"]
    assert "--phase C needs one that ended B" in found[1]["refused C"]


def test_a_run_that_has_ended_has_nothing_left_unless_its_last_phase_gets_longer(found) -> None:
    assert found[1]["nothing is left"]
    assert found[1]["longer"] == [["C", 5], ["C", 6], ["C", 7]]
    assert found[1]["longer unmet"] == [1, 2, 3, 4, 5]


def test_weights_of_another_run_are_needed_by_the_first_phase_alone(found) -> None:
    assert found[1]["from weights"] == []


def test_a_phase_that_cannot_begin_is_a_failure_of_the_run(found) -> None:
    assert found[1]["refused at a switch"] == "--data: gone"
    status, line = found[1]["left at a switch"]
    assert status == "failed" and line.startswith("failed at step 4, before the next phase: ")
    assert found[1]["after a failure"] == []


def test_the_commands_know_the_phases(found) -> None:
    said = found[1]["commands"]
    code, plan = said["plan"]
    assert code == 0, plan
    # early.weight, early.bias, late.weight; late.weight, late.bias; and `extra` of the phase that is left out.
    lines = {" ".join(line.split()) for line in plan.splitlines()}
    assert {"trainable 82 (73.2%)", "phase A 112 built, 72 trained, up to 5 steps"} <= lines
    assert "phase B 112 built, 35 trained, up to 5 steps" in lines
    assert "tokens in all 240" in lines
    assert said["eval"][0] == 0, said["eval"][1]
    assert said["evaluation"]["of_B"] == 1.0 and said["evaluation"]["loss"] == pytest.approx(
        said["logged"][0], rel=1e-6
    )
    code, text = said["check"]
    assert code == 2 and "--phases 'D': not a phase of phased_tiny: it has A, B, C" in text


@pytest.mark.parametrize("world", [1, 2])
def test_an_average_of_the_weights_is_that_of_the_formula_in_float64(found, world: int) -> None:
    apart = of(found[world], "averaged off")
    assert len(apart) == {1: 4, 2: 2}[world] and {case: off for case, off in apart.items() if off > 1e-6} == {}


@pytest.mark.parametrize("world", [1, 2])
def test_an_average_changes_no_bit_of_what_is_trained_and_is_resumed_to_the_bit(found, world: int) -> None:
    for kind in ("averaged weights", "averaged resumed"):
        cases = of(found[world], kind)
        assert len(cases) == 2 and {case: wrong for case, wrong in cases.items() if wrong} == {}


@pytest.mark.parametrize("world", [1, 2])
def test_evaluations_are_of_the_average_in_training_and_of_a_checkpoint(found, world: int) -> None:
    for losses in of(found[world], "averaged evaluated").values():
        assert losses["logged"] == pytest.approx(losses["average"], rel=1e-6)
        assert abs(losses["weights"] - losses["average"]) > 1e-3


def test_a_run_says_that_an_average_begins_in_its_midst(found) -> None:
    assert "average: of the weights begins here: " in found[1]["averaged said"]


def test_the_best_checkpoint_is_kept_and_the_phase_stops_without_a_better_one(found) -> None:
    best = found[1]["best"]
    state = {"best_of": "loss", "best": 2.0, "best_step": 4, "not_better": 3, "phase_done": True}
    assert best.pop("written")
    assert best == {
        "saved": [4, 7], "best": "checkpoint-4", "status": "finished", "state": state, "evaluated": [*range(8)],
    }  # fmt: skip
    stopped = found[1]["best stopped"]
    assert stopped.pop("written")
    assert stopped == best and found[1]["best differs"] == [], "stops on the way cost nothing"
    assert found[1]["best again"], "a start of the ended run changes nothing"


def test_no_best_checkpoint_is_named_that_a_run_does_not_have(found) -> None:
    """Going back to before it, and going on from another run's checkpoint."""
    gone = [found[1][f"best gone best-{name}"] for name in ("back", "other")]
    assert not any(case["best"] for case in gone)
    (back,), (other,) = (case["said"] for case in gone)
    assert back == "no evaluation up to step 2 has found a best"
    assert other.startswith("checkpoint-4, the best up to step 5, is not in ")


def test_more_patience_goes_on_with_a_run_that_had_none_left(found) -> None:
    further = found[1]["best further"]
    assert further["best"] == "checkpoint-9" and further["saved"] == [9] and further["status"] == "finished"
    assert further["state"]["best"] == 1.5 and further["evaluated"] == [*range(10)]
