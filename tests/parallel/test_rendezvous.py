"""The ranks that wait at the start for one that is gone end soon, and say that starting again may help."""

from __future__ import annotations

import socket
import subprocess
import sys
from datetime import timedelta

import pytest

from pipeline.engine import start
from pipeline.errors import LostRankError, RankError
from pipeline.parallel import rendezvous
from pipeline.recipes.miras import miras_tiny
from tests.launch.harness import ROOT, environment, free_port


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch):
    """Makes this process a rank of two."""

    def make(number: int, port: int) -> None:
        monkeypatch.setattr(rendezvous, "PATIENCE", timedelta(seconds=1))
        names = {"RANK": number, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))

    return make


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.timeout(60)
def test_a_rank_that_stays_away_is_lost(number: int, rank) -> None:
    rank(number, free_port())
    with pytest.raises(LostRankError, match=f"rank {number}: the ranks do not meet at 127.0.0.1") as caught:
        start(miras_tiny())
    assert caught.value.code == 3 and caught.value.speaks


def test_a_port_in_use_is_the_users_to_mend(rank) -> None:
    with socket.create_server(("", 0)) as other:
        rank(0, other.getsockname()[1])
        with pytest.raises(RankError, match="give another --master_port"):
            start(miras_tiny())


def test_the_limit_of_the_start_is_not_that_of_the_collectives() -> None:
    script = (
        "from datetime import timedelta; import torch; import torch.distributed as dist\n"
        "from pipeline.engine import AFTER_THE_WATCH, start, stop; from pipeline.recipes.miras import miras_recall\n"
        "config = miras_recall(); start(config)\n"
        "expected = timedelta(minutes=config.parallel.timeout_minutes) + AFTER_THE_WATCH\n"
        "assert dist.distributed_c10d._get_default_store().timeout == expected\n"
        "assert dist.group.WORLD._get_backend(torch.device('cpu')).options._timeout == expected\n"
        "stop()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
