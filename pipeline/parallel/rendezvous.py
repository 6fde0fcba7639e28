"""Where the ranks meet at the start: a limit of its own, and whose fault it is when they do not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

# First: it decides the accelerator that DeepSpeed picks when it is imported.
import pipeline.parallel  # noqa: F401

# isort: split
import deepspeed
import torch.distributed as dist

from pipeline.errors import LostRankError, RankError
from pipeline.leave import LOST_RANK, lost_peer

PATIENCE = timedelta(minutes=5)
"""How long the ranks wait for each other to appear. Imports from a slow disk take a minute, not more."""
SCHEME = "patient-env"


def join(backend: str, timeout: timedelta) -> None:
    """Joins the default process group, whose collectives give up after `timeout`.

    Raises LostRankError when a rank stays away for PATIENCE, RankError when this one cannot meet the others at all.
    """
    with contextlib.suppress(RuntimeError):  # of an earlier start in this process
        dist.register_rendezvous_handler(SCHEME, _meet)
    try:
        deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout, init_method=f"{SCHEME}://"
        )
    except (RuntimeError, ValueError) as error:
        rank, where = os.environ["RANK"], f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = f"rank {rank}: the ranks do not meet at {where} ({str(error).strip().splitlines()[0]})"
        if "EADDRINUSE" in str(error):
            raise RankError(f"{reason}: give another --master_port") from error
        if isinstance(error, (dist.DistStoreError, dist.DistNetworkError)) or lost_peer(error):
            # Its own words may be far away, on another node.
            speaks = os.environ.get("LOCAL_RANK", "0") == "0"
            reason += ": a rank or its node is gone, or the network between them is cut"
            raise LostRankError(reason, code=LOST_RANK, speaks=speaks) from error
        raise RankError(f"{reason}: see docs/multi_node.md") from error


def _meet(url: str, **_: object) -> Iterator[tuple[dist.Store, int, int]]:
    """torch's env://, which by itself would wait for a rank as long as a collective does."""
    store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
    # By itself only the rank that serves the store waits for the others, and under torchrun none.
    if store.add("arrived", 1) == world:
        store.set("complete", "yes")
    store.wait(["complete"], PATIENCE)
    yield store, rank, world
