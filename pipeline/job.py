"""A training job, from the start of its ranks to their end."""

from __future__ import annotations

import contextlib

from pipeline.checkpoint.finished import is_finished
from pipeline.checkpoint.state import find_checkpoint, has_trainable
from pipeline.config import RunConfig
from pipeline.create import create_run
from pipeline.errors import LostRankError
from pipeline.load import checked_system, resolve
from pipeline.parallel.collectives import together
from pipeline.parallel.topology import Topology
from pipeline.runtime.exit import LOST_RANK, last_words, leave, lost_peer, say
from pipeline.runtime.folder_lock import FolderLock
from pipeline.runtime.heartbeat import Verdict, Watch
from pipeline.runtime.ranks import start
from pipeline.runtime.stop import StopRequests
from pipeline.runtime.sync import Pulse
from pipeline.train import Trainer

LAST_LOOK = 15.0
"""Seconds in which the watch may find out which rank a failed collective waited for."""


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
            Watch(topology, timeout=timeout, on_failure=lambda why: _end_the_job(why, watch.speaks)) as watch,
        ):
            try:
                _train(config, topology, Pulse(topology, requests, watch), lock)
            except RuntimeError as error:
                if not lost_peer(error):
                    raise
                verdict = watch.verdict(LAST_LOOK)
                if verdict is not None:
                    raise LostRankError(verdict.reason, code=verdict.code, speaks=watch.speaks) from error
                reason = f"rank {topology.rank}: another rank is gone ({str(error).splitlines()[0]})"
                raise LostRankError(reason, code=LOST_RANK, speaks=True) from error


def _end_the_job(verdict: Verdict, speaks: bool) -> None:
    # From the thread of the watch: the main thread may wait in a collective for ever.
    if speaks:
        say(last_words(LostRankError(verdict.reason, code=verdict.code, speaks=True)))
    leave(verdict.code)


def _train(config: RunConfig, topology: Topology, pulse: Pulse, lock: FolderLock) -> None:
    together(topology, lambda: None if topology.rank or config.dry_run else lock.take(config.output_dir))
    # The layout first: what cannot run at all is no matter of resuming.
    system = together(topology, lambda: checked_system(config, topology))
    checkpoint = find_checkpoint(config, topology)
    resolved = together(topology, lambda: resolve(config, system, topology, checkpoint))
    if is_finished(resolved.config, checkpoint, topology):
        return
    weights = config.init_from
    if weights is not None and checkpoint is not None and not has_trainable(weights, topology):
        # A resume can do without: all that is trained comes from its checkpoint, and a hash tells frozen weights.
        weights = None
    Trainer(create_run(resolved, topology, weights=weights, lock=lock), pulse).execute(checkpoint)
