"""Evaluations, ablations and samples: each at its interval and at ends, and what an earlier start left undone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.callbacks import Callback
from pipeline.config import replace
from pipeline.data.tokenizer import ByteTokenizer
from pipeline.downstream import evaluate as downstream
from pipeline.errors import UserError
from pipeline.evaluation_config import EvaluationConfig
from pipeline.evaluations import Evaluations
from pipeline.files.run_file import read_run_file
from pipeline.intervals import check_intervals
from pipeline.parallel.topology import Topology
from pipeline.phases import Phases
from pipeline.run import Progress
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation
from tests.checkpoint.small_runs import a_run
from tests.toy_systems.phased import phased
from tests.toy_systems.phased.system import PhasedSystem


class Seen(Callback):
    """The events by kind and step."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.events.append(("evaluated", step))

    def on_ablations(self, step: int, ablations: Mapping[str, Evaluation]) -> None:
        assert ablations == {"part": Evaluation({"loss": 2.0})}
        self.events.append(("ablated", step))

    def on_samples(self, step: int, samples: Mapping[str, Any]) -> None:
        assert samples == {"text": f"seed 3, train, step {step}"}
        self.events.append(("sampled", step))


class Able(PhasedSystem):
    """Does all that there is, without a model."""

    def evaluate(self, model: Any, phase: Any, sync_point: Any) -> Evaluation:
        return Evaluation({"loss": 1.0})

    def samples(self, model: Any, phase: Any, context: Any, sync_point: Any) -> dict[str, str]:  # type: ignore[override]
        return {"text": f"seed {context.seed}, {context.phase}, step {context.step}"}

    def ablations(self, model: Any, phase: Any, sync_point: Any) -> dict[str, Evaluation]:  # type: ignore[override]
        return {"part": Evaluation({"loss": 2.0})}


class Remembering(Able):
    """Has a memory too."""

    def gap_closed(self, model: Any, phase: Any, sync_point: Any) -> Evaluation:
        return Evaluation({"gap/worth": 0.25})


class Unable(PhasedSystem):
    """Neither samples nor ablates."""

    samples = ablations = None  # type: ignore[assignment]


def evaluations(folder: Path, step: int, **changes: Any) -> tuple[Evaluations, Seen]:
    run, seen = a_run(folder, step=step), Seen()
    run.config = replace(run.config, seed=3, **changes)
    run.system, run.engine = Able(phased(folder)), SimpleNamespace(deepspeed=None, average=None)  # type: ignore[assignment]
    return Evaluations(run, SyncPoint(Topology()), [seen]), seen


@given(every=st.tuples(*[st.integers(0, 4)] * 3), ends=st.sets(st.integers(1, 12)))
def test_each_is_done_at_multiples_of_its_interval_and_at_ends(
    tmp_path_factory: pytest.TempPathFactory, every: tuple[int, int, int], ends: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    intervals = dict(zip(("eval_every", "ablate_every", "sample_every"), every, strict=True))
    found, seen = evaluations(folder, 0, **intervals)
    for step in range(1, 13):
        found.after(step, ends=step in ends)
    for kind, interval in zip(("evaluated", "ablated", "sampled"), every, strict=True):
        expected = [step for step in range(1, 13) if step in ends or (interval and step % interval == 0)]
        assert [step for what, step in seen.events if what == kind] == expected
        assert read_run_file(folder).done.get(kind, ()) == tuple(expected)


@pytest.mark.parametrize(
    ("step", "done", "owed"),
    [
        (0, {}, ["evaluated"]),
        (4, {}, ["evaluated", "sampled"]),
        (4, {"evaluated": (0, 4), "sampled": (2,)}, ["sampled"]),
        (4, {"evaluated": (0, 4), "sampled": (2, 4)}, []),
        (3, {}, ["ablated"]),
        (5, {}, []),
        (7, {"evaluated": (7,)}, ["ablated", "sampled"]),  # --stop-after
    ],
)
def test_a_start_makes_up_for_what_its_step_lacks(tmp_path: Path, step: int, done: Any, owed: list[str]) -> None:
    found, seen = evaluations(tmp_path, step, eval_every=4, sample_every=2, ablate_every=3, stop_after=7)
    found.run.done = dict(done)
    assert found.catch_up() == bool(owed)
    assert seen.events == [(kind, step) for kind in owed]
    assert not found.catch_up(), "nothing is done twice"


@settings(max_examples=25)
@given(eval_every=st.integers(0, 4), gap_every=st.integers(0, 4), ends=st.sets(st.integers(1, 12)))
def test_the_gap_is_part_of_an_evaluation_at_its_own_interval(
    tmp_path_factory: pytest.TempPathFactory, eval_every: int, gap_every: int, ends: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    found, _ = evaluations(folder, 0, eval_every=eval_every, evaluation__gap_every=gap_every)
    found.run.system = Remembering(phased(folder))
    scalars: dict[int, dict[str, float]] = {}

    class Rows(Callback):
        def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
            assert step not in scalars, "one row"
            scalars[step] = evaluation.scalars

    found.callbacks = [Rows()]
    assert found.catch_up() and scalars.pop(0) == {"loss": 1.0}, "before the first step there is nothing to measure"
    for step in range(1, 13):
        found.after(step, ends=step in ends)
        gap = bool(gap_every) and (step in ends or step % gap_every == 0)
        evaluated = step in ends or gap or bool(eval_every and step % eval_every == 0)
        wanted = {"loss": 1.0, **({"gap/worth": 0.25} if gap else {})}
        assert scalars.pop(step, None) == (wanted if evaluated else None)


def test_a_start_makes_up_for_a_gap_too(tmp_path: Path) -> None:
    found, _ = evaluations(tmp_path, 6, eval_every=0, evaluation__gap_every=3)
    found.run.system = Remembering(phased(tmp_path))
    seen: list[tuple[int, dict[str, float]]] = []

    class Rows(Callback):
        def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
            seen.append((step, evaluation.scalars))

    found.callbacks = [Rows()]
    assert found.catch_up() and seen == [(6, {"loss": 1.0, "gap/worth": 0.25})] and not found.catch_up()


class Reading(Remembering):
    """Is asked for tasks."""

    def tokenizer(self, makers: Any = None) -> ByteTokenizer:
        return ByteTokenizer()

    def text_limit(self) -> None:
        return None


def test_scores_of_tasks_are_part_of_an_evaluation_at_their_own_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks are read once, before the first step, and scored every third step and at the end."""
    asked: list[Any] = []

    def load(names: Any, path: Any, topology: Any, flag: str, *, generate: bool) -> Any:
        asked.append((names, path, flag, generate))
        return "loaded"

    def score(system: Any, model: Any, sync_point: Any, loaded: Any, tokenizer: Any, limit: Any) -> Evaluation:
        assert (loaded, tokenizer.name, limit) == ("loaded", "bytes", 5)
        return Evaluation({"downstream/words/acc": 0.5}, tables={"downstream": [{"task": "words"}]})

    monkeypatch.setattr(downstream, "load_tasks", load)
    monkeypatch.setattr(downstream, "evaluate_tasks", score)
    run, rows = a_run(tmp_path, step=0), {}
    run.config = replace(
        run.config, eval_every=2, evaluation__tasks=("words",), evaluation__tasks_every=3,
        evaluation__task_path=str(tmp_path), evaluation__task_limit=5,
    )  # fmt: skip
    run.system, run.engine = Reading(phased(tmp_path)), SimpleNamespace(deepspeed=None, average=None)  # type: ignore[assignment]

    class Rows(Callback):
        def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
            rows[step] = dict(evaluation.scalars), dict(evaluation.tables)

    found = Evaluations(run, SyncPoint(Topology()), [Rows()])
    assert asked == [(("words",), str(tmp_path), "--evaluation.tasks", False)]
    assert found.catch_up() and rows.pop(0) == ({"loss": 1.0}, {})
    for step in range(1, 6):
        found.after(step, ends=step == 5)
    scored = {"loss": 1.0, "downstream/words/acc": 0.5}, {"downstream": [{"task": "words"}]}
    assert rows == {2: ({"loss": 1.0}, {}), 3: scored, 4: ({"loss": 1.0}, {}), 5: scored}
    assert len(asked) == 1


def test_a_system_is_not_asked_for_what_it_cannot_do(tmp_path: Path) -> None:
    config = phased(tmp_path)
    for flag, field in (("--sample-every 5", "sample_every"), ("--ablate-every 5", "ablate_every")):
        asked = replace(config, **{field: 5})
        check_intervals(asked, PhasedSystem(asked))
        with pytest.raises(UserError, match=f"{flag}: phased_tiny (draws no samples|has no ablations): leave it out"):
            check_intervals(asked, Unable(asked))
    asked = replace(config, evaluation__gap_every=5)
    check_intervals(asked, Remembering(asked))
    with pytest.raises(
        UserError,
        match=r"--evaluation\.gap-every 5: phased_tiny has no memory behind an attention window: leave it out",
    ):
        check_intervals(asked, Able(asked))
    asked = replace(config, evaluation__tasks=("sciq", "copa"))
    check_intervals(asked, Reading(asked))
    with pytest.raises(UserError, match=r"--evaluation\.tasks sciq copa: phased_tiny reads no text: leave it out"):
        check_intervals(asked, Able(asked))


@pytest.mark.parametrize("changes", [{"tasks_every": 5}, {"task_path": "folder"}, {"task_limit": 3}], ids=str)
def test_without_tasks_their_flags_mean_nothing(changes: dict[str, Any]) -> None:
    EvaluationConfig(tasks=("sciq",), **changes)
    with pytest.raises(UserError, match=r"^--evaluation\.task\S+ \S+: there are no tasks: name"):
        EvaluationConfig(**changes)


class Scripted(Able):
    """Its held-out losses are known beforehand."""

    losses: tuple[float, ...] = ()

    def evaluate(self, model: Any, phase: Any, sync_point: Any) -> Evaluation:
        return Evaluation({"loss": self.losses[model.step()], "other": 1.0})


@settings(max_examples=25)
@given(
    losses=st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan, math.inf]), min_size=1, max_size=12),
    stop=st.integers(0, 12),
)
def test_the_best_is_the_first_of_the_lowest_however_often_a_run_starts(
    tmp_path_factory: pytest.TempPathFactory, losses: list[float], stop: int
) -> None:
    folder = tmp_path_factory.mktemp("run")

    def start(step: int) -> Evaluations:
        found, _ = evaluations(folder, step, eval_every=1, evaluation__best="loss")
        found.run.system = Scripted(phased(folder))
        found.run.system.losses = (0.5, *losses)
        found.run.engine = SimpleNamespace(  # type: ignore[assignment]
            deepspeed=SimpleNamespace(step=lambda: found.run.progress.step), average=None
        )
        return found

    found = start(0)
    found.catch_up()
    for step in range(1, len(losses) + 1):
        if step == stop:
            # What trainer_state.json holds of a save after the evaluation; run.json may know less.
            before, found = found, start(step - 1)
            found.run.progress = dataclasses.replace(before.run.progress)
            found.catch_up()
        found.run.progress.step = step
        assert found.decides(step)
        found.decide(step, ends=False)
        found.after(step, ends=False)
    progress, finite = found.run.progress, [value for value in losses if math.isfinite(value)]
    best = losses.index(min(finite)) + 1 if finite else 0
    assert progress.best_step == best and progress.not_better == len(losses) - best
    assert (progress.best, progress.best_of) == (min(finite) if finite else 0.0, "loss")


def test_a_phase_begins_without_a_best_and_another_number_is_another_best() -> None:
    progress = Progress(step=3, phase="A")
    assert progress.judge("loss", 2.0) and not progress.judge("loss", 2.0) and progress.not_better == 1
    progress.step = 4
    assert progress.judge("bound", 5.0) and (progress.best_step, progress.not_better) == (4, 0)
    assert not progress.judge("bound", 6.0) and progress.not_better == 1
    progress.enter("B")
    progress.step = 6
    assert (progress.best_step, progress.not_better, progress.judged) == (4, 0, 0), "until there is another"
    assert progress.judge("bound", 7.0) and (progress.best_step, progress.best_phase) == (6, "B")
    old = {"step": 6, "phase": "B", "best_of": "loss", "best": 2.0, "best_step": 5}
    assert Progress(**old).best_phase == "B" and not Progress(**old).judge("loss", 3.0)


def test_a_number_that_no_evaluation_has_is_refused_before_the_first_step(tmp_path: Path) -> None:
    found, _ = evaluations(tmp_path, 0, evaluation__best="bound")
    with pytest.raises(
        UserError, match=r"--evaluation\.best bound: no number of the held-out evaluation, which has loss"
    ):
        found.catch_up()


def test_without_a_best_no_evaluation_comes_before_its_save(tmp_path: Path) -> None:
    found, seen = evaluations(tmp_path, 3, eval_every=3)
    found.decide(3, ends=True)
    assert not found.decides(3) and seen.events == [] and not found.run.progress.judged


def ruled(folder: Path, step: int, **changes: Any) -> Evaluations:
    """Evaluations of a phase that ends when `other`, which is the step, reaches 4."""
    found, _ = evaluations(folder, step, **changes)
    phase = found.run.phase
    found.run.phase = dataclasses.replace(phase, until_evaluated=lambda numbers: numbers["other"] >= 4, judged=False)

    class Counting(Able):
        def evaluate(self, model: Any, phase: Any, sync_point: Any) -> Evaluation:
            return Evaluation({"other": float(found.run.progress.step)})

    found.run.system = Counting(phased(folder))
    return found


def test_a_phase_ends_by_an_evaluation_before_its_step_is_saved(tmp_path: Path) -> None:
    found = ruled(tmp_path, 0, eval_every=2)
    for step in range(1, 5):
        found.run.progress.step = step
        assert found.decides(step) == (step % 2 == 0)
        found.decide(step, ends=False)
        assert (found.run.progress.rule_met, found.run.is_over) == (step == 4, step == 4)
    assert found.run.done["evaluated"] == (2, 4)


def test_an_evaluation_of_the_weights_that_a_phase_begins_with_does_not_end_it(tmp_path: Path) -> None:
    found = ruled(tmp_path, 6, eval_every=3)
    found.run.progress.phase_start = 6
    assert found.catch_up() and not found.run.progress.rule_met
    # What the phase before still owed is none of it either.
    found = ruled(tmp_path, 6, eval_every=3)
    found.run.progress.phase = "before"
    found.run.phases = Phases((dataclasses.replace(found.run.phase, name="before"), found.run.phase), 1)
    assert found.catch_up() and not found.run.progress.rule_met


def test_a_phase_that_is_not_judged_needs_no_number_of_the_best(tmp_path: Path) -> None:
    """Its evaluations have no loss, and do not count."""
    found = ruled(tmp_path, 1, eval_every=1, evaluation__best="loss", evaluation__patience=1)
    found.run.phase = dataclasses.replace(found.run.phase, until_evaluated=None)
    assert not found.decides(1)
    found.after(1, ends=False)
    assert (found.run.progress.judged, found.run.progress.not_better, found.run.is_over) == (0, 0, False)
    found.run.phase = dataclasses.replace(found.run.phase, judged=True)
    found.run.done.clear()
    with pytest.raises(
        UserError, match=r"--evaluation\.best loss: no number of the held-out evaluation, which has other"
    ):
        found.after(1, ends=False)
