"""Forked ranks end as those of launchers do: a failure has its exit code and words, and a death is no success."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.launch.forked import Forked, forked


def test_one_rank_is_the_command_with_its_exit_code_and_both_outputs(tmp_path: Path) -> None:
    done = forked(1, "pipeline", "--version")
    assert done.returncode == 0 and done.stdout.startswith("mnemos ") and done.stderr == ""
    done = forked(1, "json.tool", str(tmp_path / "absent"))
    assert done.returncode != 0 and "absent" in done.stderr and done.stdout == ""


def test_several_ranks_say_what_is_wrong_once_and_fail() -> None:
    done = forked(2, "pipeline", "no-such-command")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("unknown command 'no-such-command'") == 1


def test_a_rank_that_is_killed_is_no_success() -> None:
    job = Forked(1, "http.server", "--bind", "127.0.0.1", "0")
    assert job.poll() is None and job.rank(0).is_running()
    begun = time.monotonic()
    job.rank(0).send_signal(signal.SIGKILL)
    assert job.end() == 256 - signal.SIGKILL and time.monotonic() - begun < 30
