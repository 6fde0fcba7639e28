"""`--suite`: the registry, the flags of a suite, and what a system lacks for it."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from pipeline.config import RunConfig
from pipeline.config_file import save_config
from pipeline.errors import UserError
from pipeline.evals.suites import SUITES, pop_suite
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_recall
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation, Phase, create_system
from tests.checkpoint.whole import write_whole
from tests.toy_systems.phased import phased
from tests.toy_systems.phased.system import PhasedSystem

ARGUMENTS: Any = (nn.Linear(1, 1), Phase("train", 1, ()), SyncPoint(Topology()))


def test_without_a_suite_a_system_is_evaluated_as_in_training() -> None:
    chosen, rest = pop_suite(["--steps", "3", "--lengths", "5"])
    assert rest == ["--steps", "3", "--lengths", "5"], "no flag of a suite that is not asked for"
    assert chosen.folder == ""
    wanted = Evaluation({"loss": 1.0})
    system: Any = types.SimpleNamespace(evaluate=lambda model, phase, sync_point: wanted)
    assert chosen.run(system, *ARGUMENTS) is wanted


def test_a_suite_takes_its_own_flags_and_leaves_the_recipes() -> None:
    chosen, rest = pop_suite(["--lengths=1024,4096", "--seed", "1", "--suite", "recall", "--queries", "32"])
    assert rest == ["--seed", "1"] and chosen.folder == "recall"
    asked = {}

    def recall_suite(model: object, sync_point: object, **options: object) -> Evaluation:
        asked.update(options)
        return Evaluation({})

    chosen.run(types.SimpleNamespace(recall_suite=recall_suite), *ARGUMENTS)  # type: ignore[arg-type]
    assert asked == {"lengths": (1024, 4096), "queries": 32}
    asked.clear()
    words = ["--suite", "recall", "--forms", "needle,common words"]
    pop_suite(words)[0].run(types.SimpleNamespace(recall_suite=recall_suite), *ARGUMENTS)  # type: ignore[arg-type]
    assert asked == {"forms": ("needle", "common words")}
    with pytest.raises(UserError, match="--forms 'qa4': give some of needle, variables, common words, qa1, qa2, qa3"):
        pop_suite(["--suite", "recall", "--forms", "needle,qa4"])


def test_the_long_suite_is_gap_closed_alone_in_a_folder_of_its_own() -> None:
    gap = Evaluation({"gap/closed": 0.5})
    chosen, _ = pop_suite(["--suite", "long"])
    assert chosen.run(types.SimpleNamespace(gap_closed=lambda *_: gap), *ARGUMENTS) is gap  # type: ignore[arg-type]
    assert chosen.folder == "long"


def test_the_suite_of_peptides_hands_its_numbers_on(tmp_path: Path) -> None:
    words = ["--suite", "peptides", "--samples", "20", "--decoys=3", "--guidance", "1.5", "--seed", "1"]
    chosen, rest = pop_suite(words)
    assert rest == ["--seed", "1"] and chosen.folder == "peptides" and chosen.suite.reads_data
    asked = {}

    def peptide_suite(model: object, phase: object, sync_point: object, **options: float) -> Evaluation:
        asked.update(options)
        return Evaluation({})

    chosen.run(types.SimpleNamespace(peptide_suite=peptide_suite), *ARGUMENTS)  # type: ignore[arg-type]
    assert asked == {"samples": 20, "decoys": 3, "guidance": 1.5}
    with pytest.raises(UserError, match=r"--suite peptides: .* is no model of peptides: leave it out"):
        chosen.check(PhasedSystem(phased(tmp_path)))


def test_the_suite_of_contexts_has_no_control_unless_one_is_given(tmp_path: Path) -> None:
    chosen, rest = pop_suite(["--suite", "contexts", "--seed", "1"])
    assert rest == ["--seed", "1"] and chosen.folder == "contexts" and chosen.suite.reads_data
    asked: list[object] = []

    def context_suite(model: object, phase: object, sync_point: object, control: object) -> Evaluation:
        asked.append(control)
        return Evaluation({})

    system: Any = types.SimpleNamespace(context_suite=context_suite)
    chosen.prepared(system, tmp_path, Topology()).run(system, *ARGUMENTS)
    assert asked == [None]
    with pytest.raises(UserError, match=r"--suite contexts: .* has no contexts: leave it out"):
        chosen.check(PhasedSystem(phased(tmp_path)))


def test_a_control_is_asked_for_before_a_model_is_loaded(tmp_path: Path) -> None:
    save_config(miras_recall(), tmp_path / "config.yaml")
    (tmp_path / "trainable.safetensors").write_bytes(b"")
    write_whole(tmp_path, {"step": 1})
    chosen, _ = pop_suite(["--suite", "contexts", "--control", str(tmp_path)])
    asked = []

    def check_control(checkpoint: Path, config: RunConfig, control: Path) -> None:
        asked.append((checkpoint, config.recipe))
        raise UserError(f"--control {control}: no")

    system: Any = types.SimpleNamespace(check_control=check_control)
    with pytest.raises(UserError, match=f"--control {tmp_path}: no"):
        chosen.prepared(system, tmp_path / "own", Topology())
    assert asked == [(tmp_path / "own", "miras_recall")]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--suite", "recal"], "--suite 'recal': give one of .*recall.*, or leave it out"),
        (["--suite", "recall", "--lengths", "1K"], "--lengths '1K': give whole numbers above 0, such as 1024,16384"),
        (["--suite", "recall", "--lengths", "0"], "--lengths '0': give whole numbers"),
        (["--suite", "lifelong", "--documents", "2,1"], "^--documents '2,1': give rising numbers: --documents 1,2$"),
        (["--suite", "lifelong", "--lengths", "64,64"], "--lengths '64,64': give rising numbers: --lengths 64$"),
        (["--suite", "recall", "--queries", "3,4"], "--queries '3,4': give one number"),
        (["--suite"], "--suite needs a value"),
        (
            ["--suite", "contexts", "--control", "/absent"],
            "/absent: no such folder: give --control a checkpoint",
        ),
        (["--suite", "peptides", "--samples", "0"], "--samples '0': give whole numbers above 0"),
        (["--suite", "peptides", "--guidance", "-1"], "--guidance '-1': give a number of 0 or more"),
        (["--suite", "peptides", "--temperature", "warm"], "--temperature 'warm': give a number of 0 or more"),
        (["--suite", "downstream", "--tasks", "sciq,,copa"], "--tasks 'sciq,,copa': give names, such as sciq,copa"),
        (["--suite", "downstream", "--limit", "0.1"], "--limit '0.1': give whole numbers above 0"),
        (["--suite", "downstream", "--task-path", "/absent"], "--task-path /absent: no such folder"),
    ],
)
def test_refusals(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pop_suite(words)


def test_a_system_without_the_capability_is_refused(tmp_path: Path) -> None:
    chosen, _ = pop_suite(["--suite", "recall"])
    chosen.check(create_system(miras_recall()))
    with pytest.raises(UserError, match=r"--suite recall: .* cannot be asked for what stood far back: leave it out"):
        chosen.check(PhasedSystem(phased(tmp_path)))


def test_tasks_come_with_their_flags_and_need_a_model_of_text(tmp_path: Path) -> None:
    words = ["--suite", "downstream", "--tasks", "sciq, copa", "--limit=3", "--task-path", str(tmp_path), "--seed", "1"]
    chosen, rest = pop_suite(words)
    assert rest == ["--seed", "1"] and chosen.folder == "downstream" and not chosen.suite.reads_data
    assert chosen.values == {"--tasks": ("sciq", "copa"), "--limit": 3, "--task-path": str(tmp_path)}
    chosen.check(create_system(miras_recall()))
    with pytest.raises(UserError, match=r"--suite downstream: .* reads no text: leave it out"):
        chosen.check(PhasedSystem(phased(tmp_path)))
    with pytest.raises(UserError, match="trained on the recall task, whose ids stand for no text"):
        chosen.prepared(create_system(miras_recall()), tmp_path, Topology())


def test_every_suite_says_what_a_system_lacks() -> None:
    assert SUITES and all(suite.lacks for suite in SUITES.values())
