"""The ranks that wait at the start for one that is gone end soon, and say that starting again may help."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from pipeline.config import replace
from pipeline.errors import LostRankError, RankError
from pipeline.parallel import rendezvous
from pipeline.recipes.miras import miras_tiny
from pipeline.runtime.ranks import start
from tests.launch.harness import ROOT, environment, free_port

HURRIED = replace(miras_tiny(), parallel__start_minutes=1 / 60)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch):
    """Makes this process a rank of two."""

    def make(number: int, port: int) -> None:
        names = {"RANK": number, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))

    return make


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.timeout(60)
def test_a_rank_that_stays_away_is_lost(number: int, rank) -> None:
    rank(number, free_port())
    with pytest.raises(LostRankError, match=f"rank {number}: the ranks do not meet at 127.0.0.1") as caught:
        start(HURRIED)
    assert caught.value.code == 3 and caught.value.should_report


def test_a_port_in_use_is_the_users_to_mend(rank) -> None:
    with socket.create_server(("", 0)) as other:
        rank(0, other.getsockname()[1])
        with pytest.raises(RankError, match="give another --master_port"):
            start(miras_tiny())


def test_the_limit_of_the_start_is_not_that_of_the_collectives() -> None:
    script = (
        "from datetime import timedelta; import torch; import torch.distributed as dist\n"
        "from pipeline.runtime.ranks import HEARTBEAT_MARGIN, start, stop\n"
        "from pipeline.recipes.miras import miras_recall\n"
        "config = miras_recall(); start(config)\n"
        "expected = timedelta(minutes=config.parallel.timeout_minutes) + HEARTBEAT_MARGIN\n"
        "assert dist.distributed_c10d._get_default_store().timeout == expected\n"
        "assert dist.group.WORLD._get_backend(torch.device('cpu')).options._timeout == expected\n"
        "stop()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_store_that_outlives_its_ranks_serves_those_that_come_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps its own over restarts, in which there may be fewer ranks."""
    store = dist.HashStore()

    def meet(restart: int, rank: int, world: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        monkeypatch.setattr(rendezvous.dist, "rendezvous", lambda *_, **__: iter([(store, rank, world)]))
        next(rendezvous._meet("timeout-env://?seconds=0.1"))

    for rank in range(3):
        with pytest.raises(dist.DistStoreError, match="no sign of rank" if rank < 2 else "no sign of rank 3$"):
            meet(0, rank, 4)
    with pytest.raises(dist.DistStoreError, match=r"no sign of rank 1$"):
        meet(1, 0, 2)
    meet(1, 1, 2)
    with pytest.raises(dist.DistStoreError, match=r"no sign of rank 1, 2, 3$"):
        meet(2, 0, 4)
