"""A training job, from the start of its ranks to their end."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

from pipeline.checkpoint.finished import is_finished
from pipeline.checkpoint.locate import find_checkpoint
from pipeline.checkpoint.manifest import pointed
from pipeline.checkpoint.trainable import has_trainable
from pipeline.config import RunConfig
from pipeline.create_run import create_run
from pipeline.end_run import recorded_switch
from pipeline.errors import LOST_RANK, LostRankError, lost_peer
from pipeline.load import Resolved, checked_system, resolve
from pipeline.parallel.collectives import broadcast_object, shared_errors
from pipeline.parallel.topology import Topology
from pipeline.run_name import in_folder, new_folder
from pipeline.runtime.exit import exit_message, exit_process, log_line
from pipeline.runtime.folder_lock import FolderLock
from pipeline.runtime.heartbeat import Diagnosis, HeartbeatMonitor
from pipeline.runtime.ranks import start
from pipeline.runtime.stop import StopRequests
from pipeline.runtime.sync import SyncPoint
from pipeline.train import Trainer

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
            HeartbeatMonitor(topology, timeout=timeout, on_failure=_end_the_job) as monitor,
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
        folder = new_folder(config)
    config = in_folder(config, broadcast_object(topology, folder))
    with shared_errors(topology):
        if topology.rank == 0 and not config.dry_run:
            lock.acquire(config.output_dir)
    # The layout first: what cannot run at all is no matter of resuming.
    with shared_errors(topology):
        system = checked_system(config, topology)
    checkpoint = find_checkpoint(config, topology)
    if is_finished(config, checkpoint, topology):
        return
    resolved = resolve(system, topology, checkpoint)
    # What the data decides may have been all that looked as if something were left.
    if resolved.config != config and is_finished(resolved.config, checkpoint, topology):
        return
    trainer = _begin(resolved, topology, sync_point, lock, checkpoint)
    while trainer.execute():
        ended = trainer.run
        ended.engine.close()
        assert ended.last_checkpoint is not None
        checkpoint = ended.folder / "checkpoints" / ended.last_checkpoint
        with recorded_switch(ended):
            # What held the phase's engine may refer to itself.
            del trainer
            ended.release()
            gc.collect()
            # As a process would that began here: what a system keeps between calls is the ended phase's.
            with shared_errors(topology):
                system = checked_system(config, topology)
            resolved = resolve(system, topology, checkpoint)
            trainer = _begin(resolved, topology, sync_point, lock, checkpoint)


def _begin(
    resolved: Resolved, topology: Topology, sync_point: SyncPoint, lock: FolderLock, checkpoint: Path | None
) -> Trainer:
    """A phase that is ready for its first step."""
    weights = None if resolved.config.init_from is None else pointed(resolved.config.init_from)
    if weights is not None and checkpoint is not None and not has_trainable(weights, topology):
        # A resume can do without: its checkpoint has all that is trained, and a hash identifies the frozen weights.
        weights = None
    run = create_run(resolved, topology, weights=weights, checkpoint=checkpoint, lock=lock)
    trainer = Trainer(run, sync_point)
    trainer.begin(checkpoint)
    return trainer
