"""THE loop. It knows no system by name."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from pipeline.archive import save_config
from pipeline.callbacks import Callback, create_callbacks
from pipeline.checkpoint.state import (
    check_resumable,
    find_checkpoint,
    keep_global_batch,
    load_trainable,
    restore,
    save_checkpoint,
)
from pipeline.config import RunConfig
from pipeline.engine import Engine, StepResult, building, deepspeed_config, device_of, precision_of, start, zero_stage
from pipeline.errors import UserError
from pipeline.meter import Meter
from pipeline.parallel.agreement import agree, next_step, together
from pipeline.parallel.loss import global_counts, scaled_loss
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import full_shape
from pipeline.run import Run, write_json, write_run_file
from pipeline.schedule import lr_multiple
from pipeline.system import Carry, CarryEntry, Phase, StatefulLoader, StepContext, System, create_system


def train(config: RunConfig) -> None:
    """Runs a recipe to its end, from wherever its newest checkpoint is. Raises UserError on every rank alike."""
    topology = start(config)
    checkpoint = find_checkpoint(config, topology)
    config, system, ds_config = together(topology, lambda: _prepare(config, topology, checkpoint))
    run = Run(config, topology, device_of(topology), system, config.output_dir)
    with building(ds_config, precision_of(config)):
        model = system.build()
    system.initialise(model, topology)
    if config.init_from is not None:
        load_trainable(model, config.init_from, topology)
    phases = system.phases(model)
    if len(phases) != 1:
        raise ValueError(f"{system.name} has {len(phases)} phases: the loop runs one until moments carry over by name")
    Trainer(run, phases[0], model, ds_config).execute(checkpoint)


def _prepare(
    config: RunConfig, topology: Topology, checkpoint: Path | None
) -> tuple[RunConfig, System, dict[str, object]]:
    # The layout first: what cannot run at all is no matter of resuming.
    create_system(config).check(topology)
    config = keep_global_batch(config, topology, checkpoint)
    ds_config = deepspeed_config(config)
    if checkpoint is not None:
        check_resumable(config, topology.world, zero_stage(ds_config), checkpoint)
    return config, create_system(config), ds_config


class Trainer:
    """One phase: its engine, data and carry."""

    def __init__(self, run: Run, phase: Phase, model: nn.Module, ds_config: dict[str, object]) -> None:
        self.run, self.phase = run, phase
        self.loader: StatefulLoader = together(run.topology, lambda: run.system.loader(phase, run.topology))
        run.phase, run.progress.phase = phase, phase.name
        self.ds_config = ds_config
        run.engine = self.engine = Engine(model, phase, run.config, ds_config)
        run.chosen = self._chosen(model)
        self.carries: list[Carry] = [{} for _ in range(run.config.grad_accum)]
        first = run.topology.data_rank * run.config.grad_accum
        rows = run.config.batch_size
        self.streams: list[Sequence[int]] = [
            range((first + micro) * rows, (first + micro + 1) * rows) for micro in range(run.config.grad_accum)
        ]
        self.callbacks: list[Callback] = []

    def _chosen(self, model: nn.Module) -> dict[str, str]:
        run, config, topology = self.run, self.run.config, self.run.topology
        dtype = precision_of(config)
        sizes = {name: math.prod(full_shape(parameter)) for name, parameter in model.named_parameters()}
        trainable = sum(sizes[name] for group in self.phase.groups for name in group.parameters)
        return {
            config.recipe: f"{topology.world} ranks (data {topology.data} x sequence {topology.sequence}),"
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
        last = min(self.phase.steps, config.stop_after or self.phase.steps)
        if config.dry_run:
            self._dry_run()
            return
        # Only now: a start that was refused leaves the folder as it is.
        _open_folder(run, self.ds_config)
        self.callbacks = together(run.topology, lambda: create_callbacks(run))
        status = "failed"
        try:
            for callback in self.callbacks:
                callback.on_start()
            if run.progress.step == 0:
                self._evaluate(0)
            self._steps(last)
            status = "finished" if run.progress.step >= self.phase.steps else "stopped"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            for callback in self.callbacks:
                callback.on_end(status)
            if run.is_main:
                write_run_file(run, status)

    def _steps(self, last: int) -> None:
        run, config, progress = self.run, self.run.config, self.run.progress
        meter = Meter(run)
        while progress.step < last:
            step = progress.step + 1
            result = self.step(step, meter)
            progress.step = step
            due = step == last or (config.save_every and step % config.save_every == 0)
            # A checkpoint holds the tokens and seconds up to its step.
            if due or step % config.report.log_every == 0:
                record = meter.record(step, result)
                for callback in self.callbacks:
                    callback.on_step(record)
            for callback in self.callbacks:
                callback.after_step(step)
            self._count_skipped(result)
            paused = time.perf_counter()
            if due:
                self._save()
            if step == last or (config.eval_every and step % config.eval_every == 0):
                self._evaluate(step)
            # Saving and evaluating is not training time.
            meter.begun += time.perf_counter() - paused

    def step(self, step: int, meter: Meter) -> StepResult:
        """One optimizer step: forward and backward of every micro-batch, then the update."""
        context = StepContext(self.run.topology, self.run.config.seed, self.phase.name, step)
        carries = self._accumulate(context, meter)
        result = self.engine.step(lr_multiple(self.run.config, step))
        if not result.skipped:
            # The state that a skipped step left behind may be what made it non-finite: the streams go on without it.
            self.carries = carries
            self.run.system.after_step(self.engine.module, context)
        return result

    def _accumulate(self, context: StepContext, meter: Meter) -> list[Carry]:
        """Gradients of one step's micro-batches; returns what each carries on."""
        run = self.run
        batches = next_step(self.loader, run.topology, run.device)
        counts = global_counts([run.system.count(batch) for batch in batches], run.topology, run.device)
        meter.add_counts(counts)
        carries = []
        for batch, carry in zip(batches, self.carries, strict=True):
            output = run.system.forward(self.engine.deepspeed, batch.to(run.device), carry, context)
            self.engine.backward(scaled_loss(output.sums, counts, run.topology))
            meter.add(output)
            carries.append(_detached(output.carry))
        return carries

    def _count_skipped(self, result: StepResult) -> None:
        progress, limit = self.run.progress, self.run.config.optimizer.max_skipped
        if not result.skipped:
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row >= limit:
            raise UserError(
                f"step {progress.step}: {limit} updates in a row had a non-finite loss or gradient and were skipped:"
                " lower --lr, or resume from an earlier checkpoint"
            )

    def _save(self) -> None:
        name = save_checkpoint(self.run, self.loader, self.carries, self.streams)
        if self.run.is_main:
            write_run_file(self.run, "running")
        for callback in self.callbacks:
            callback.on_checkpoint(name)

    def _evaluate(self, step: int) -> None:
        evaluation = self.run.system.evaluate(self.engine.deepspeed, self.phase, self.run.topology)
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


def _detached(carry: Carry) -> Carry:
    return {name: CarryEntry(entry.tensor.detach(), entry.streams, entry.heads) for name, entry in carry.items()}


def _open_folder(run: Run, ds_config: dict[str, object]) -> None:
    problem = None
    if run.is_main:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            save_config(run.config, run.folder / "config.yaml")
            write_json(run.folder / "ds_config.json", ds_config)
            write_run_file(run, "running")
        except OSError as error:
            problem = f"--output-dir {run.folder}: {error.strerror or error}: name a folder that can be written"
        if problem is None and not os.access(run.folder, os.W_OK):
            problem = f"--output-dir {run.folder}: not writable: name another folder"
    agree(run.topology, problem)
