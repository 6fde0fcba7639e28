"""What can be said of the engine before there is a process group."""

from __future__ import annotations

import pytest

from pipeline.errors import UserError
from pipeline.recipes.miras import miras_tiny
from pipeline.runtime.ranks import start


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_ranks_of_a_launcher_that_does_not_number_them_are_no_runs_of_their_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(name, "4")
    with pytest.raises(UserError, match=f"{name} is 4, but RANK is not set: start the ranks with launch.sh"):
        start(miras_tiny())
