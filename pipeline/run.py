"""A run: what it is made of, where it stands, and what callbacks see of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config import RunConfig
from pipeline.parallel.topology import Topology
from pipeline.runtime.folder_lock import FolderLock

if TYPE_CHECKING:
    from pipeline.data.batch import StatefulLoader
    from pipeline.engine import Engine
    from pipeline.system import Phase, System


@dataclass
class Progress:
    """Where the run stands; saved in trainer_state.json."""

    step: int = 0
    """Optimizer steps taken, skipped updates included."""
    phase: str = ""
    tokens: int = 0
    """Counted labels so far, all ranks."""
    skipped: int = 0
    """Updates skipped because a gradient was not finite."""
    skipped_in_a_row: int = 0
    elapsed: float = 0.0
    """Seconds of training, over all resumes."""


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
    progress: Progress = field(default_factory=Progress)
    last_checkpoint: str | None = None
    evaluated: tuple[int, ...] = ()
    """The steps that were evaluated; run.json keeps them for the next start."""
    lock: FolderLock = field(default_factory=FolderLock)
    """Held by rank 0, so that no other run writes to the folder."""
    chosen: dict[str, str] = field(default_factory=dict)
    """What was chosen for this machine, for the log: layout, backends, data, parameters."""

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
