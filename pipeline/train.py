"""THE loop. It knows no system by name."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path

from pipeline.callbacks import Callback, create_callbacks
from pipeline.checkpoint.contents import take_snapshot
from pipeline.checkpoint.restore import restore
from pipeline.checkpoint.save import Saver
from pipeline.end_run import recorded_end
from pipeline.engine import StepResult
from pipeline.evaluations import Evaluations
from pipeline.meter import Meter
from pipeline.parallel.loss import scaled_loss
from pipeline.run import Run
from pipeline.run_folder import open_folder, write_run_file
from pipeline.runtime.stop import Stopped
from pipeline.runtime.sync import SyncPoint, next_counted_step
from pipeline.system import Carry, CarryEntry, StepContext, StepOutput
from pipeline.update_watch import UpdateWatch


class Trainer:
    """One phase of a run: its steps, and what they leave behind."""

    def __init__(self, run: Run, sync_point: SyncPoint | None = None) -> None:
        self.run, self.sync_point = run, sync_point or SyncPoint(run.topology)
        self.loader, self.engine, self.phase = run.loader, run.engine, run.phase
        self.carries: list[Carry] = [{} for _ in range(run.config.grad_accum)]
        self.callbacks: list[Callback] = []
        self.saver = Saver(run)
        self.outputs: list[StepOutput] = []
        """What the last step's micro-batches measured."""
        self.result = StepResult(0.0, False, 0.0)
        """What the last step did."""
        self.saved: int | None = None
        """The step of the newest checkpoint that was begun."""
        self.snapshot = take_snapshot(run, self.carries)
        """The last completed step."""
        self.from_elsewhere = False
        """Whether the checkpoint that it goes on from is that of another run directory."""

    def begin(self, checkpoint: Path | None) -> None:
        """Goes back to where `checkpoint` was saved, or to the start, and opens the run directory. Collective; raises
        UserError."""
        run = self.run
        if checkpoint is not None:
            carries = restore(run, checkpoint)
            self.carries = carries or self.carries
            self.snapshot = take_snapshot(run, self.carries)
            self.saved = run.progress.step
            self.from_elsewhere = checkpoint.resolve().parent != self.saver.folder.resolve()
            run.chosen["resumed"] = f"from {checkpoint}"
        if not run.config.dry_run:
            # Only now: a start that was refused leaves the folder as it is.
            open_folder(run)
            self.saver.mend_best()
            self.callbacks = create_callbacks(run)

    def execute(self) -> bool:
        """Trains to the phase's end, or to where the run stops; `begin` comes before.

        Returns whether another phase follows, which begins with the run's last checkpoint.
        """
        run = self.run
        if run.config.dry_run:
            self._dry_run()
            return False
        with recorded_end(run, self.saver, self.callbacks, self.sync_point.monitor):
            for callback in self.callbacks:
                callback.on_start()
            meter = Meter(run)
            try:
                self._steps(meter)
            except Stopped:
                self._save_what_is_done(meter)
                raise
        return run.goes_on

    def _steps(self, meter: Meter) -> None:
        config, progress = self.run.config, self.run.progress
        if self._begins_anew:
            self._begin_phase()
            if config.save_at_start:
                self._save()
        watch = UpdateWatch(self.run, self.callbacks)
        evaluations = Evaluations(self.run, self.sync_point, self.callbacks)
        decided = (progress.judged, progress.rule_met)
        evaluations.catch_up()
        if progress.phase != self.phase.name:
            progress.enter(self.phase.name)
            # Not before: what the phase before still owed was measured as that phase left the model.
            self._begin_phase()
        else:
            # With more --steps a phase goes on that had ended by their number.
            progress.phase_done = self.run.is_over
            if (progress.judged, progress.rule_met) != decided:
                # The checkpoint of this step does not know of the evaluation yet.
                self._save()
        meter.begun = time.perf_counter()
        last = min(self.run.end_of_phase, config.stop_after or self.run.end_of_phase)
        if (self.from_elsewhere or self.saved is None) and (progress.step >= last or progress.phase_done):
            # No step will: what it stands at is saved here too, as these ranks hold it.
            self._save()
        while progress.step < last and not progress.phase_done:
            step = progress.step + 1
            due = step == last or (config.save_every and step % config.save_every == 0)
            # A checkpoint holds the tokens and seconds up to its step.
            logged = bool(due) or evaluations.decides(step) or step % config.report.log_every == 0
            result = self.step(step, meter, logged=logged)
            progress.step, self.result = step, result
            if self.phase.until is not None:
                numbers = {**meter.numbers(), "phase_step": progress.phase_step}
                progress.rule_met = bool(self.phase.until(numbers))
            progress.phase_done = self.run.is_over
            ends = step == last or progress.phase_done
            if logged or ends:
                self._record(meter)
            for callback in self.callbacks:
                callback.after_step(step)
            watch.after(result, self.outputs, self.snapshot.cursors)
            self.snapshot = take_snapshot(self.run, self.carries)
            paused = time.perf_counter()
            self._committed(self.saver.poll())
            evaluations.decide(step, ends=ends)
            progress.phase_done = self.run.is_over
            ends = step == last or progress.phase_done
            if due or ends or progress.best_step == step:
                self._save(background=config.async_save and not ends)
            if self.engine.average is not None:
                # What is being saved must not be exchanged for the average.
                self.saver.release()
            evaluations.after(step, ends=ends)
            for callback in self.callbacks:
                callback.while_paused(step)
            # Saving and evaluating is not training time.
            meter.begun += time.perf_counter() - paused
        self._committed(self.saver.finish())

    @property
    def _begins_anew(self) -> bool:
        """Whether the next step is the first of the run, of which no checkpoint was saved."""
        return self.run.progress.step == 0 and self.saved is None

    def _begin_phase(self) -> None:
        """What the system does before the phase's first step. Collective."""
        self.sync_point.at(f"the start of phase {self.phase.name}")
        self.run.system.begin_phase(self.engine.module, self.phase, self.sync_point)

    def step(self, step: int, meter: Meter, *, logged: bool = True) -> StepResult:
        """One optimizer step: forward and backward of every micro-batch, then the update."""
        context = self._context(step, logged)
        carries = self._accumulate(context, meter)
        if logged:
            meter.add_gradients()
        self.saver.release()
        result = self.engine.step(self.run.lr_multiple(step))
        meter.events.add(result)
        if not result.skipped:
            # The state that a skipped step left behind may be what made it non-finite: the streams go on without it.
            self.carries = carries
            self.run.system.after_step(self.engine.module, context)
        return result

    def _context(self, step: int, logged: bool) -> StepContext:
        return StepContext(self.run.topology, self.run.config.seed, self.phase.name, step, heavy_metrics=logged)

    def _accumulate(self, context: StepContext, meter: Meter) -> list[Carry]:
        """Gradients of one step's micro-batches; returns what each carries on."""
        run = self.run
        place = f"step {context.step}, micro-batch 1"
        batches, counts = next_counted_step(self.loader, self.sync_point, place, run.system.count, meter.add_wait)
        carries, outputs = [], []
        for micro, (batch, carry) in enumerate(zip(batches, self.carries, strict=True), start=1):
            if micro > 1:
                self.sync_point(f"step {context.step}, micro-batch {micro}")
            output = run.system.forward(self.engine.deepspeed, batch.to(run.device), carry, context)
            assert batch.rows == run.config.batch_size, "row i of every step is stream i"
            self.engine.backward(scaled_loss(output.sums, counts, run.topology))
            outputs.append(_measured(output))
            carries.append(_detached(output.carry))
        # Not before: a step that is abandoned half-way counts for nothing.
        meter.add_counts(counts)
        for output in outputs:
            meter.add(output)
        self.outputs = outputs
        return carries

    def _record(self, meter: Meter) -> None:
        record = meter.record(self.run.progress.step, self.result)
        for callback in self.callbacks:
            callback.on_step(record)

    def _save(self, *, background: bool = False) -> None:
        progress = self.run.progress
        self.sync_point.at(f"saving checkpoint-{progress.step}")
        self.saved = progress.step
        # Its tokens and seconds may have been recorded since.
        snapshot = dataclasses.replace(self.snapshot, progress=dataclasses.replace(progress))
        self._committed(self.saver.save(snapshot, background=background))

    def _committed(self, names: Iterable[str]) -> None:
        for name in names:
            if self.run.is_main:
                write_run_file(self.run, "running")
            for callback in self.callbacks:
                callback.on_checkpoint(name)

    def _save_what_is_done(self, meter: Meter) -> None:
        """A checkpoint of the last completed step; what was begun of the next one is forgotten."""
        self._committed(self.saver.finish())
        if self.saved == self.run.progress.step or self.run.progress.step == 0:
            return
        if meter.steps:
            self._record(meter)
        self._save()

    def _dry_run(self) -> None:
        if self._begins_anew or self.run.progress.phase != self.phase.name:
            self._begin_phase()
        meter = Meter(self.run)
        self._accumulate(self._context(1, True), meter)
        record = meter.record(1, self.result)
        if self.run.is_main:
            print(
                f"dry run: loss {record.loss:.4f}, {record.tok_s:.0f} tok/s, peak memory"
                f" {record.peak_memory / 2**30:.2f} GiB; no weight was changed and nothing was saved"
            )


def _measured(output: StepOutput) -> StepOutput:
    """The numbers of a micro-batch without the graph and the state behind them."""
    sums = {term: value.detach() for term, value in output.sums.items()}
    return dataclasses.replace(output, sums=sums, carry={}, tokens={})


def _detached(carry: Carry) -> Carry:
    return {name: CarryEntry(entry.tensor.detach(), entry.streams, entry.heads) for name, entry in carry.items()}
