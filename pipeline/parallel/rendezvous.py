"""Where the ranks meet at the start: a limit of its own, and whose fault it is when they do not."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from urllib.parse import parse_qs, urlsplit

import deepspeed
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger

from pipeline.errors import LOST_RANK, LostRankError, RankError, lost_peer
from pipeline.host.hardware import on_gpu

SCHEME = "timeout-env"


def join(backend: str, timeout: timedelta, start_timeout: timedelta) -> None:
    """Joins the default process group, whose collectives give up after `timeout`.

    Raises LostRankError when a rank stays away for `start_timeout`, RankError when this one cannot meet the others.
    """
    _quieten()
    with contextlib.suppress(RuntimeError):  # of an earlier start in this process
        dist.register_rendezvous_handler(SCHEME, _meet)
    try:
        deepspeed.init_distributed(
            dist_backend=backend,
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timeout,
            init_method=f"{SCHEME}://?seconds={start_timeout.total_seconds()}",
        )
    except (RuntimeError, ValueError) as error:
        rank, where = os.environ["RANK"], f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = f"rank {rank}: the ranks do not meet at {where} ({str(error).strip().splitlines()[0]})"
        if "EADDRINUSE" in str(error):
            raise RankError(f"{reason}: give another --master_port") from error
        if isinstance(error, (dist.DistStoreError, dist.DistNetworkError)) or lost_peer(error):
            # Its own words may be far away, on another node.
            should_report = os.environ.get("LOCAL_RANK", "0") == "0"
            reason += ": a rank or its node is gone, or the network between them is cut"
            raise LostRankError(reason, code=LOST_RANK, should_report=should_report) from error
        raise RankError(f"{reason}: see docs/multi_node.md") from error


def _quieten() -> None:
    deepspeed_logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that newer torch releases rename: not the user's doing.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    if not on_gpu():
        # DeepSpeed would compile an operation that only its inference uses, and stop where there is no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _meet(url: str, **_: object) -> Iterator[tuple[dist.Store, int, int]]:
    """torch's env://, which by itself would wait for a rank as long as a collective does."""
    start_timeout = timedelta(seconds=float(parse_qs(urlsplit(url).query)["seconds"][0]))
    store, rank, world = next(dist.rendezvous("env://", timeout=start_timeout))
    # By itself only the rank that serves the store waits for the others, and under torchrun none. That store outlives
    # its ranks, which may come again, and in another number.
    attempt = f"arrived/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{world}"
    store.set(f"{attempt}/{rank}", "yes")
    try:
        store.wait([f"{attempt}/{other}" for other in range(world)], start_timeout)
    except dist.DistStoreError as error:
        absent = [str(other) for other in range(world) if not store.check([f"{attempt}/{other}"])]
        raise dist.DistStoreError(f"no sign of rank {', '.join(absent)}") from error
    yield store, rank, world
