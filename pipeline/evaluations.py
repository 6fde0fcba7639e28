"""What a run does to its model between two steps, each kind at an interval of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from pipeline.callbacks import Callback
from pipeline.capabilities import Ablates, ClosesGap, Samples, ScoresText
from pipeline.downstream.evaluate import TasksInTraining
from pipeline.errors import UserError
from pipeline.evaluation_result import together
from pipeline.run import Run
from pipeline.run_folder import write_run_file
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation, Phase, StepContext


class Evaluations:
    """Held-out evaluations, ablations and samples: at multiples of their intervals, and where a phase or the run ends.

    What a memory is worth, and the scores of tasks, are part of an evaluation where they are due. run.json lists the
    steps at which each was done, so that a start makes up for what an earlier one had left.
    """

    def __init__(self, run: Run, sync_point: SyncPoint, callbacks: Sequence[Callback]) -> None:
        self.run, self.sync_point, self.callbacks = run, sync_point, callbacks
        config = run.config
        self.kinds: dict[str, tuple[tuple[int, ...], Callable[[int, bool], None]]] = {
            "evaluated": (
                (config.eval_every, config.evaluation.gap_every, config.evaluation.tasks_every),
                self._evaluate,
            )
        }
        self.tasks: TasksInTraining | None = None
        if config.evaluation.tasks:
            assert isinstance(run.system, ScoresText)
            # Before the first step: not the first evaluation, an hour later, is to find that a task is unknown.
            self.tasks = TasksInTraining.load(config, run.system, run.topology)
        if isinstance(run.system, Ablates):
            self.kinds["ablated"] = ((config.ablate_every,), self._ablate)
        if isinstance(run.system, Samples):
            self.kinds["sampled"] = ((config.sample_every,), self._sample)

    def after(self, step: int, *, ends: bool) -> None:
        """Does what is due after a step and is not done yet. `ends`: whether the phase or the run ends with it."""
        due = [kind for kind, (every, _) in self.kinds.items() if ends or _is_due(step, *every)]
        self._do([kind for kind in due if step not in self.run.done.get(kind, ())], step, ends)

    @property
    def _has_a_say(self) -> bool:
        """Whether an evaluation decides which checkpoint is the best, or whether the phase ends."""
        phase = self.run.phase
        return phase.until_evaluated is not None or (phase.judged and self.run.config.evaluation.best is not None)

    def decides(self, step: int) -> bool:
        """Whether the evaluation that is due at a step decides what becomes of the run."""
        return self._has_a_say and _is_due(step, *self.kinds["evaluated"][0])

    def decide(self, step: int, *, ends: bool) -> None:
        """Makes the evaluation that is due before the step is saved, so that its checkpoint knows of it."""
        if self.decides(step) or (self._has_a_say and ends):
            self._do(["evaluated"], step, ends)

    def catch_up(self) -> bool:
        """Does what is due at the step that the run begins at and was not done there; returns whether anything was.

        Before the first step that is an evaluation alone.
        """
        run, step = self.run, self.run.progress.step
        end = run.end_of_phase
        ends = step >= min(end, run.config.stop_after or end) or run.progress.phase_done
        due = [
            kind
            for kind, (every, _) in self.kinds.items()
            if (ends or _is_due(step, *every) if step else kind == "evaluated") and step not in run.done.get(kind, ())
        ]
        self._do(due, step, ends)
        return bool(due)

    def _do(self, kinds: Sequence[str], step: int, ends: bool) -> None:
        average = self.run.engine.average
        # Before the first update it is the weights.
        averaged = average.in_place() if average is not None and average.updates and kinds else contextlib.nullcontext()
        with averaged:
            for kind in kinds:
                self.kinds[kind][1](step, ends)
                self.run.done[kind] = (*self.run.done.get(kind, ()), step)
                if self.run.is_main:
                    write_run_file(self.run, "running")

    @property
    def _phase(self) -> Phase:
        """That of the last step: what it still owed when it ended is done before the next one begins."""
        run = self.run
        name = run.progress.phase
        return run.phase if run.phases is None or name == run.phase.name else run.phases.named(name)

    def _evaluate(self, step: int, ends: bool) -> None:
        system, model, section = self.run.system, self.run.engine.deepspeed, self.run.config.evaluation
        evaluation = system.evaluate(model, self._phase, self.sync_point)
        if section.gap_every and (ends or _is_due(step, section.gap_every)) and step:
            assert isinstance(system, ClosesGap)
            evaluation = together(evaluation, system.gap_closed(model, self._phase, self.sync_point))
        if self.tasks is not None and (ends or _is_due(step, section.tasks_every)) and step:
            assert isinstance(system, ScoresText)
            evaluation = together(evaluation, self.tasks.evaluate(system, model, self.sync_point))
        for callback in self.callbacks:
            callback.on_evaluation(step, evaluation)
        if section.best is not None and self._phase.judged:
            self._count(section.best, step, evaluation)
        if _is_due(step, *self.kinds["evaluated"][0]):
            self._ask(evaluation)

    def _ask(self, evaluation: Evaluation) -> None:
        """Ends the phase where its rule says so, by an evaluation that is due: a stop on the way changes nothing.
        One of the weights that the phase began with is none of it."""
        run = self.run
        rule, progress = run.phase.until_evaluated, run.progress
        if rule is not None and progress.phase == run.phase.name and progress.phase_step:
            met = bool(rule({**evaluation.scalars, "phase_step": progress.phase_step}))
            progress.rule_met = progress.rule_met or met

    def _count(self, best: str, step: int, evaluation: Evaluation) -> None:
        """Takes note of whether an evaluation is the best; that of a phase before the current one is none of it."""
        run = self.run
        if best not in evaluation.scalars:
            raise UserError(
                f"--evaluation.best {best}: no number of the held-out evaluation, which has"
                f" {', '.join(evaluation.scalars)}: name one of these"
            )
        # An evaluation that is made again, of the same weights, counts once.
        if step != run.progress.judged and run.progress.phase == run.phase.name:
            is_best = run.progress.judge(best, evaluation.scalars[best])
            for callback in self.callbacks:
                callback.on_judged(step, is_best)

    def _ablate(self, step: int, ends: bool) -> None:
        system = self.run.system
        assert isinstance(system, Ablates)
        ablations = system.ablations(self.run.engine.deepspeed, self._phase, self.sync_point)
        for callback in self.callbacks:
            callback.on_ablations(step, ablations)

    def _sample(self, step: int, ends: bool) -> None:
        system, phase = self.run.system, self._phase
        assert isinstance(system, Samples)
        context = StepContext(self.run.topology, self.run.config.seed, phase.name, step)
        samples = system.samples(self.run.engine.deepspeed, phase, context, self.sync_point)
        # Of data without text there are none.
        for callback in self.callbacks if samples else ():
            callback.on_samples(step, samples)


def _is_due(step: int, *intervals: int) -> bool:
    """Whether a step is a multiple of one of the intervals; 0 has none."""
    return any(every and step % every == 0 for every in intervals)
