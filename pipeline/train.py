"""THE loop. It knows no system by name."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from pipeline.callbacks import Callback, create_callbacks
from pipeline.callbacks.metrics import is_evaluated
from pipeline.checkpoint.finished import is_finished
from pipeline.checkpoint.frozen import frozen_weights
from pipeline.checkpoint.manifest import clear_leftovers, named_checkpoints
from pipeline.checkpoint.save import Moment, Saver
from pipeline.checkpoint.state import (
    check_resumable,
    find_checkpoint,
    has_trainable,
    keep_global_batch,
    load_trainable,
    restore,
    rng_state,
    seed_all,
)
from pipeline.config import RunConfig
from pipeline.config_file import save_config
from pipeline.data.batch import StatefulLoader
from pipeline.data.build import list_data
from pipeline.data.resume import different_rank
from pipeline.engine import Engine, StepResult, building, deepspeed_config, device_of, precision_of, start
from pipeline.errors import LostRankError, RankError, UserError
from pipeline.files.output import not_written, write_json
from pipeline.meter import Meter
from pipeline.parallel.collectives import all_gather_object, broadcast_object, raise_together, shared_errors
from pipeline.parallel.loss import global_counts, scaled_loss
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import full_shape
from pipeline.run import Run, write_run_file
from pipeline.runtime.exit import LOST_RANK, exit_message, exit_process, log_line, lost_peer, out_of_space
from pipeline.runtime.folder_lock import FolderLock
from pipeline.runtime.heartbeat import Diagnosis, HeartbeatMonitor
from pipeline.runtime.stop import Stopped, StopRequests
from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.schedule import lr_multiple
from pipeline.system import Carry, CarryEntry, Phase, StepContext, StepOutput, System, create_system

LAST_LOOK = 15.0
"""Seconds in which the monitor may find out which rank a failed collective waited for."""


def train(config: RunConfig, requests: StopRequests | None = None) -> None:
    """Runs a recipe to its end, from wherever its newest checkpoint is.

    Raises UserError or Stopped on every rank alike, and LostRankError on those that are left when one is gone.
    `requests`: what may stop it, noted since the start of the process; without, since this call.
    """
    with contextlib.ExitStack() as stack:
        requests = requests or stack.enter_context(StopRequests(config.max_hours))
        topology = start(config)
        timeout = 60 * config.parallel.timeout_minutes
        with (
            FolderLock() as lock,
            HeartbeatMonitor(
                topology, timeout=timeout, on_failure=lambda why: _end_the_job(why, monitor.should_report)
            ) as monitor,
        ):
            try:
                _train(config, topology, SyncPoint(topology, requests, monitor), lock)
            except RuntimeError as error:
                if not lost_peer(error):
                    raise
                diagnosis = monitor.diagnosis(LAST_LOOK)
                if diagnosis is not None:
                    raise LostRankError(
                        diagnosis.reason, code=diagnosis.code, should_report=monitor.should_report
                    ) from error
                reason = f"rank {topology.rank}: another rank is gone ({str(error).splitlines()[0]})"
                raise LostRankError(reason, code=LOST_RANK, should_report=True) from error


def _end_the_job(diagnosis: Diagnosis, should_report: bool) -> None:
    # From the thread of the monitor: the main thread may wait in a collective for ever.
    if should_report:
        log_line(exit_message(LostRankError(diagnosis.reason, code=diagnosis.code, should_report=True)))
    exit_process(diagnosis.code)


def _train(config: RunConfig, topology: Topology, sync_point: SyncPoint, lock: FolderLock) -> None:
    with shared_errors(topology):
        if topology.rank == 0 and not config.dry_run:
            lock.acquire(config.output_dir)
    checkpoint = find_checkpoint(config, topology)
    with shared_errors(topology):
        config, system, ds_config = _prepare(config, topology, checkpoint)
    if is_finished(config, checkpoint, topology):
        return
    # Once, for all ranks and for both sides of the hold-out: a folder may change while it is read.
    with shared_errors(topology):
        listed = list_data(config) if topology.rank == 0 else None
    system.files = broadcast_object(topology, listed)
    run = Run(config, topology, device_of(topology), system, config.output_dir, lock=lock)
    # Nothing that is trained depends on a process's own generators; what else draws from them is repeatable too.
    seed_all(config.seed, f"rank {topology.rank} of {topology.world}")
    with building(ds_config, precision_of(config)):
        model = system.build()
    system.initialise(model, topology)
    if config.init_from is not None and (checkpoint is None or has_trainable(config.init_from, topology)):
        # A resume can do without: all that is trained comes from its checkpoint, and a hash tells frozen weights.
        load_trainable(model, config.init_from, topology)
    phases = system.phases(model)
    if len(phases) != 1:
        raise ValueError(f"{system.name} has {len(phases)} phases: the loop runs one until moments carry over by name")
    Trainer(run, phases[0], model, ds_config, sync_point).execute(checkpoint)


def _prepare(
    config: RunConfig, topology: Topology, checkpoint: Path | None
) -> tuple[RunConfig, System, dict[str, object]]:
    # The layout first: what cannot run at all is no matter of resuming.
    create_system(config).check(topology)
    if checkpoint is not None:
        check_resumable(config, checkpoint)
        config = keep_global_batch(config, topology, checkpoint)
    return config, create_system(config), deepspeed_config(config)


class Trainer:
    """One phase: its engine, data and carry."""

    def __init__(
        self,
        run: Run,
        phase: Phase,
        model: nn.Module,
        ds_config: dict[str, object],
        sync_point: SyncPoint | None = None,
    ) -> None:
        self.run, self.phase, self.sync_point = run, phase, sync_point or SyncPoint(run.topology)
        with shared_errors(run.topology):
            self.loader: StatefulLoader = run.system.loader(phase, run.topology)
        run.phase, run.progress.phase = phase, phase.name
        self.ds_config = ds_config
        trained = {name for group in phase.groups for name in group.parameters}
        run.frozen = frozen_weights(model, trained, run.topology)
        run.engine = self.engine = Engine(model, phase, run.config, ds_config)
        run.chosen = self._chosen(model)
        self.carries: list[Carry] = [{} for _ in range(run.config.grad_accum)]
        first = run.topology.data_rank * run.config.grad_accum
        rows = run.config.batch_size
        self.streams: list[Sequence[int]] = [
            range((first + micro) * rows, (first + micro + 1) * rows) for micro in range(run.config.grad_accum)
        ]
        self.callbacks: list[Callback] = []
        self.saver = Saver(run, self.streams)
        self.outputs: list[StepOutput] = []
        """What the last step's micro-batches measured."""
        self.saved: int | None = None
        """The step of the newest checkpoint that was begun."""
        # The first look at the data's fingerprint reads the data, which one rank may fail at.
        with shared_errors(run.topology):
            self._remember()
        raise_together(run.topology, different_rank(all_gather_object(run.topology, self.position["fingerprint"])))

    def _remember(self) -> None:
        """Where the data and the generators are after a completed step, for a checkpoint of it at any later moment."""
        self.position: dict[str, Any] = self.loader.state_dict()
        self.rng = rng_state()

    def _chosen(self, model: nn.Module) -> dict[str, str]:
        run, config, topology = self.run, self.run.config, self.run.topology
        dtype = precision_of(config)
        sizes = {name: math.prod(full_shape(parameter)) for name, parameter in model.named_parameters()}
        trainable = sum(sizes[name] for group in self.phase.groups for name in group.parameters)
        ranks = "1 rank" if topology.world == 1 else f"{topology.world} ranks"
        return {
            config.recipe: f"{ranks} (data {topology.data} x sequence {topology.sequence}),"
            f" {config.zero}, {str(dtype).removeprefix('torch.')} on {run.device.type}",
            "parameters": f"{sum(sizes.values()):,}, of which {trainable:,} are trained",
            **run.system.describe(run.device.type, dtype),
            "data": self.loader.describe(),
        }

    def execute(self, checkpoint: Path | None) -> None:
        """Trains from `checkpoint` (or the start) to the phase's end."""
        run, config = self.run, self.run.config
        if checkpoint is not None:
            carries = restore(run, checkpoint, self.loader, self.streams)
            self.carries = carries or self.carries
            self._remember()
            self.saved = run.progress.step
            run.chosen["resumed"] = f"from {checkpoint}"
        last = min(self.phase.steps, config.stop_after or self.phase.steps)
        if config.dry_run:
            self._dry_run()
            return
        # Only now: a start that was refused leaves the folder as it is.
        _open_folder(run, self.ds_config)
        with shared_errors(run.topology):
            self.callbacks = create_callbacks(run)
        status = "failed"
        shared: Stopped | UserError | None = None
        try:
            for callback in self.callbacks:
                callback.on_start()
            meter = Meter(run)
            try:
                self._steps(last, meter)
            except Stopped:
                self._save_what_is_done(meter)
                raise
            status = "finished" if run.progress.step >= self.phase.steps else "stopped"
        except Stopped as stop:
            status, shared = "stopped" if stop.signal is None else "interrupted", stop
            raise
        except UserError as error:
            shared = error
            raise
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        except OSError as error:
            if not out_of_space(error):
                raise
            # Libraries write pictures, events and traces; they name no file.
            shared = not_written(Path(error.filename or run.folder), error)
            raise shared from error
        finally:
            self._end(status, shared)

    def _end(self, status: str, shared: Stopped | UserError | None) -> None:
        """How the run ends, and why, is said before anything that may take long or never come back.

        `shared`: what all ranks end by, or what this one alone cannot write. Whatever goes wrong here, the run's own
        outcome counts.
        """
        if isinstance(shared, UserError) and self.sync_point.monitor is not None:
            # The others end by the same error, and must not be held to have failed while this rank goes on.
            self.sync_point.monitor.ends(shared)
        if self.run.is_main and shared is not None:
            with contextlib.suppress(OSError), tqdm.external_write_mode(file=sys.stderr):  # there may be a bar
                log_line(exit_message(shared))
            shared.reported = True
        last: list[tuple[str, Callable[[], None]]] = []
        if self.run.is_main:
            last.append(("run.json", lambda: write_run_file(self.run, status)))
        # A run that fails says why before the others, who wait for it, take it for lost.
        last.append(("the save", lambda: self.saver.close(waits=status != "failed")))
        last += [(type(callback).__name__, functools.partial(callback.on_end, status)) for callback in self.callbacks]
        for name, part in last:
            try:
                part()
            except Exception as error:
                # One line says what cannot be written; the other files of the folder would only repeat it.
                if not (isinstance(error, RankError) and isinstance(shared, RankError)):
                    warnings.warn(f"{name} did not end well: {error}", stacklevel=2)

    def _steps(self, last: int, meter: Meter) -> None:
        config, progress = self.run.config, self.run.progress
        if self._owes_evaluation(last):
            self._evaluate(progress.step)
            meter.begun = time.perf_counter()
        while progress.step < last:
            step = progress.step + 1
            result = self.step(step, meter)
            progress.step, self.result = step, result
            due = step == last or (config.save_every and step % config.save_every == 0)
            # A checkpoint holds the tokens and seconds up to its step.
            if due or step % config.report.log_every == 0:
                self._record(meter)
            for callback in self.callbacks:
                callback.after_step(step)
            self._count_skipped(result)
            self._remember()
            paused = time.perf_counter()
            self._committed(self.saver.poll())
            if due:
                self._save(background=config.async_save and step != last)
            if step == last or (config.eval_every and step % config.eval_every == 0):
                self._evaluate(step)
            # Saving and evaluating is not training time.
            meter.begun += time.perf_counter() - paused
        self._committed(self.saver.finish())

    def _owes_evaluation(self, last: int) -> bool:
        """Whether the step that the run stands at is evaluated before it goes on: a run may have ended meanwhile."""
        run, step = self.run, self.run.progress.step
        every = run.config.eval_every
        due = step == 0 or step >= last or bool(every and step % every == 0)
        if not due:
            return False
        with shared_errors(run.topology):
            evaluated = run.is_main and is_evaluated(run.folder, step)
        return not broadcast_object(run.topology, evaluated)

    def step(self, step: int, meter: Meter) -> StepResult:
        """One optimizer step: forward and backward of every micro-batch, then the update."""
        context = StepContext(self.run.topology, self.run.config.seed, self.phase.name, step)
        carries = self._accumulate(context, meter)
        self.saver.release()
        result = self.engine.step(lr_multiple(self.run.config, step))
        if not result.skipped:
            # The state that a skipped step left behind may be what made it non-finite: the streams go on without it.
            self.carries = carries
            self.run.system.after_step(self.engine.module, context)
        return result

    def _accumulate(self, context: StepContext, meter: Meter) -> list[Carry]:
        """Gradients of one step's micro-batches; returns what each carries on."""
        run = self.run
        batches = next_step(self.loader, self.sync_point, f"step {context.step}, micro-batch 1")
        counts = global_counts([run.system.count(batch) for batch in batches], run.topology, run.device)
        carries, outputs = [], []
        for micro, (batch, carry) in enumerate(zip(batches, self.carries, strict=True), start=1):
            if micro > 1:
                self.sync_point(f"step {context.step}, micro-batch {micro}")
            output = run.system.forward(self.engine.deepspeed, batch.to(run.device), carry, context)
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

    def _count_skipped(self, result: StepResult) -> None:
        progress, limit = self.run.progress, self.run.config.optimizer.max_skipped
        if not result.skipped:
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        blamed = self._blamed()
        for callback in self.callbacks:
            callback.on_skip(progress.step, progress.skipped_in_a_row, blamed)
        if progress.skipped_in_a_row >= limit:
            raise UserError(
                f"step {progress.step}: {limit} updates in a row had a non-finite loss or gradient and were skipped"
                f" (training.log names their batches): lower --lr, or resume from an earlier checkpoint"
            )

    def _blamed(self) -> dict[str, Any]:
        """Where the batch of a skipped step began, by stream: those with a non-finite loss, or else all. Collective."""
        bad = {
            str(int(stream))
            for output, streams in zip(self.outputs, self.streams, strict=True)
            if not all(bool(value.isfinite()) for value in output.sums.values())
            for stream in streams
        }
        places = {
            stream: {key: value for key, value in place.items() if isinstance(value, int)}
            for stream, place in self.position["streams"].items()
        }
        mine = {stream: place for stream, place in places.items() if stream in bad}
        everyone = all_gather_object(self.run.topology, (mine, places))
        found = {stream: place for blamed, _ in everyone for stream, place in blamed.items()}
        return found or {stream: place for _, streams in everyone for stream, place in streams.items()}

    def _save(self, *, background: bool = False) -> None:
        progress = self.run.progress
        self.sync_point.at(f"saving checkpoint-{progress.step}")
        self.saved = progress.step
        moment = Moment(dataclasses.replace(progress), self.position, self.rng, self.carries)
        self._committed(self.saver.save(moment, background=background))

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

    def _evaluate(self, step: int) -> None:
        evaluation = self.run.system.evaluate(self.engine.deepspeed, self.phase, self.sync_point)
        for callback in self.callbacks:
            callback.on_evaluation(step, evaluation)

    def _dry_run(self) -> None:
        meter = Meter(self.run)
        self._accumulate(StepContext(self.run.topology, self.run.config.seed, self.phase.name, 1), meter)
        record = meter.record(1, StepResult(0.0, False, 0.0))
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


def _open_folder(run: Run, ds_config: dict[str, object]) -> None:
    problem = None
    if run.is_main:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            taken = run.lock.acquire(run.folder)
            checkpoints = run.folder / "checkpoints"
            if taken and named_checkpoints(checkpoints):
                raise UserError(f"--output-dir {run.folder}: another run has saved there meanwhile: start again")
            clear_leftovers(checkpoints)
            save_config(run.config, run.folder / "config.yaml")
            write_json(run.folder / "ds_config.json", ds_config)
            write_run_file(run, "running")
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"--output-dir {run.folder}: {error.strerror or error}: name a folder that can be written"
        if problem is None and not os.access(run.folder, os.W_OK):
            problem = f"--output-dir {run.folder}: not writable: name another folder"
    raise_together(run.topology, problem)
