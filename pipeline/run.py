"""A run: what it is made of, where it stands, and what callbacks see of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.capabilities import CountsEpochs
from pipeline.config import RunConfig
from pipeline.parallel.topology import Topology
from pipeline.runtime.folder_lock import FolderLock
from pipeline.schedule import lr_multiple, schedule_of

if TYPE_CHECKING:
    from pipeline.data.batch import StatefulLoader
    from pipeline.engine import Engine
    from pipeline.phases import Phases
    from pipeline.system import Phase, System


@dataclass
class Progress:
    """Where the run stands; saved in trainer_state.json."""

    step: int = 0
    """Optimizer steps taken, skipped updates included."""
    phase: str = ""
    """The phase of the last step; before the first one, that of the step to come."""
    phase_start: int = 0
    """The step before the phase's first."""
    phase_done: bool = False
    """Whether the phase has ended, by its number of steps or by its stopping rule."""
    rule_met: bool = False
    """Whether its stopping rule has ended it."""
    phases_before: tuple[str, ...] = ()
    """The phases that the run has gone through before this one."""
    phase_ends: tuple[int, ...] = ()
    """The steps at which they ended, of those that were gone through since this is written down."""
    tokens: int = 0
    """Counted labels so far, all ranks."""
    skipped: int = 0
    """Updates skipped because a gradient was not finite."""
    skipped_in_a_row: int = 0
    elapsed: float = 0.0
    """Seconds of training, over all resumes."""
    best_of: str = ""
    """The number of the evaluations that `best` is of: what --evaluation.best was."""
    best_phase: str = ""
    """The phase that `best` is of: the last one in which an evaluation was compared."""
    best: float = 0.0
    """The lowest that an evaluation in that phase has found."""
    best_step: int = 0
    """The step of that evaluation; 0: there was none."""
    not_better: int = 0
    """Evaluations in the phase of the last step since then."""
    judged: int = 0
    """The step of the last evaluation that was compared with the best."""

    def __post_init__(self) -> None:
        # Lists in JSON.
        self.phases_before, self.phase_ends = tuple(self.phases_before), tuple(self.phase_ends)
        if self.best_step and not self.best_phase:
            # Saved before the field existed, when each phase began without a best.
            self.best_phase = self.phase

    @property
    def phase_step(self) -> int:
        """Steps taken in the phase."""
        return self.step - self.phase_start

    def enter(self, phase: str) -> None:
        """The next step is the first of `phase`."""
        if self.phase:
            self.phases_before = (*self.phases_before, self.phase)
            self.phase_ends = (*self.phase_ends, self.step)
        self.phase, self.phase_start, self.phase_done, self.rule_met = phase, self.step, False, False
        # What is the best of the phase before stays so until an evaluation of this one is compared.
        self.not_better, self.judged = 0, 0

    def judge(self, name: str, value: float) -> bool:
        """Counts an evaluation at the run's step, whose number `name` is `value`; returns whether it is the lowest of
        the phase. One that is not finite never is."""
        if (name, self.phase) != (self.best_of, self.best_phase):
            self.best_of, self.best_phase, self.best, self.best_step, self.not_better = name, self.phase, 0.0, 0, 0
        self.judged = self.step
        if math.isfinite(value) and (not self.best_step or value < self.best):
            self.best, self.best_step, self.not_better = value, self.step, 0
            return True
        self.not_better += 1
        return False


@dataclass
class Run:
    """Everything the loop and the callbacks share."""

    config: RunConfig
    topology: Topology
    device: torch.device
    system: System
    phase: Phase
    engine: Engine
    loader: StatefulLoader
    ds_config: dict[str, Any]
    frozen: dict[str, Any] | None = None
    """What the weights that are not trained are, for checkpoints to name; None when all are trained."""
    phases: Phases | None = None
    """Where `phase` stands among those of the run; None: it is the only one."""
    progress: Progress = field(default_factory=Progress)
    last_checkpoint: str | None = None
    done: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The steps at which the model was `evaluated`, `ablated` and `sampled`; run.json keeps them for the next start."""
    lock: FolderLock = field(default_factory=FolderLock)
    """Held by rank 0, so that no other run writes to the folder."""
    chosen: dict[str, str] = field(default_factory=dict)
    """What was chosen for this machine, for the log: layout, backends, data, parameters."""

    def release(self) -> None:
        """Drops engine, loader and system, to free their memory. Config, phase and progress stay."""
        del self.engine, self.loader, self.system

    @property
    def trained(self) -> list[str]:
        """Parameters that a checkpoint holds by name: those of the phase, and those that others of the system train."""
        here = [name for group in self.phase.groups for name in group.parameters]
        return here if self.phases is None else [*here, *sorted(self.phases.at_rest)]

    @property
    def several(self) -> bool:
        """Whether the run is made of several phases."""
        return self.phases is not None and len(self.phases.every) > 1

    @property
    def end_of_phase(self) -> int:
        """The step at which the phase ends at the latest."""
        progress = self.progress
        begun = progress.phase in ("", self.phase.name)
        return (progress.phase_start if begun else progress.step) + self.phase.steps

    def lr_multiple(self, step: int) -> float:
        """The learning rate of a step of the phase, as a multiple of its peak."""
        schedule = self.phase.schedule or schedule_of(self.config)
        return lr_multiple(schedule, self.phase.steps, step - self.progress.phase_start)

    @property
    def is_over(self) -> bool:
        """Whether the phase has made all its steps, or ends before: by its rule, or without a better evaluation."""
        progress, patience = self.progress, self.config.evaluation.patience
        out_of_patience = 0 < patience <= progress.not_better
        return progress.rule_met or out_of_patience or progress.phase_step >= self.phase.steps

    def epoch(self, step: int) -> float | None:
        """Passes over the training data that the phase has made at a step; None of a system that counts none."""
        if not isinstance(self.system, CountsEpochs):
            return None
        return (step - self.progress.phase_start) / self.system.steps_per_epoch(self.topology)

    @property
    def goes_on(self) -> bool:
        """Whether the phase has ended and another one follows in this start."""
        stop, step = self.config.stop_after, self.progress.step
        return self.progress.phase_done and bool(self.phases and self.phases.after) and not (stop and step >= stop)

    @property
    def last_step(self) -> int:
        """The step at which this start ends at the latest, over all phases that it goes through."""
        after = () if self.phases is None else self.phases.after
        last = self.end_of_phase + sum(phase.steps for phase in after)
        return min(last, self.config.stop_after or last)

    @property
    def is_main(self) -> bool:
        """Rank 0 alone writes files and talks to a person."""
        return self.topology.rank == 0

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.config.output_dir

    @property
    def streams(self) -> list[Sequence[int]]:
        """Global stream ids of this rank's rows, by micro-batch."""
        rows, count = self.config.batch_size, self.config.grad_accum
        first = self.topology.data_rank * count
        return [range((first + micro) * rows, (first + micro + 1) * rows) for micro in range(count)]

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of one step, over all ranks."""
        config = self.config
        return config.batch_size * config.grad_accum * self.topology.data * config.sequence_length
