"""Checks that need no rank, made before any is started."""

from __future__ import annotations

import importlib.util
import os
import shutil

from pipeline.checkpoint.compatibility import check_sizes
from pipeline.checkpoint.locate import locate_checkpoint
from pipeline.checkpoint.manifest import pointed
from pipeline.checkpoint.trainable import TRAINABLE
from pipeline.config import RunConfig
from pipeline.create_run import phases_of
from pipeline.downstream.tasks import check_installed, check_path
from pipeline.errors import UserError
from pipeline.host.hardware import on_gpu
from pipeline.load import checked_system, decide, model_without_storage
from pipeline.parallel.topology import Topology, check_degrees
from pipeline.parallel.weight_files import file_tensors
from pipeline.precision import precision_of
from pipeline.run_name import in_folder, new_folder
from pipeline.runtime.folder_lock import FolderLock

MIN_FREE = 64 * 2**20
"""Bytes without which a run is not started."""


def preflight(config: RunConfig, ranks: int) -> None:
    """Raises UserError for whatever can be known to fail with `ranks` ranks: layout, files, data, space."""
    check_degrees(ranks, config.parallel.sequence)
    config = in_folder(config, new_folder(config))
    topology = Topology(world=ranks, sequence=config.parallel.sequence)
    system = checked_system(config, topology)
    with FolderLock() as lock:
        lock.acquire(config.output_dir)
        checkpoint = locate_checkpoint(config)
    system.files = system.list_data()
    resolved = decide(system, topology, checkpoint)
    config, system = resolved.config, resolved.system
    system.describe("cuda" if on_gpu() else "cpu", precision_of(config))
    loaded = model_without_storage(config)
    if config.init_from is not None:
        weights = pointed(config.init_from)
        if (weights / TRAINABLE).is_file():
            file_tensors(weights / TRAINABLE)
            check_sizes(config, loaded.model, weights)
        elif checkpoint is None:
            raise UserError(f"--init-from {config.init_from}: no {TRAINABLE} there: give a checkpoint folder")
    # The first step's documents show what a start alone would not: a malformed line, a token id beyond the vocabulary.
    phases = phases_of(config, loaded.phases, checkpoint)
    for phase in (phases.current, *phases.after):
        system.loader(phase, topology).next_step()
        system.held_out(phase, topology).next_step()
    if config.evaluation.tasks:
        check_installed("--evaluation.tasks")
        check_path(config.evaluation.task_path, "--evaluation.task-path")
    if config.report.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("--report.wandb needs the wandb package: pip install -e '.[wandb]'")
    parent = config.output_dir.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output-dir {config.output_dir}: {parent} is not a folder that can be written: name another")
    free = shutil.disk_usage(parent).free
    if free < MIN_FREE:
        raise UserError(f"--output-dir {config.output_dir}: {free / 2**20:.0f} MiB free, no space for a run: make room")
