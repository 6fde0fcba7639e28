"""Three real ranks over gloo, one of which dies, stalls or is stopped: the others end, and name it."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from tests.launch.forked import forked
from tests.launch.watch_main import TIMEOUT, WORLD


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("watch")
    done = forked(1, "tests.launch.watch_main", str(out), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "result.json").read_text())


def others(ends: dict[str, dict[str, Any]], job: str) -> list[dict[str, Any]]:
    return [ends[f"{job}-{rank}"] for rank in range(WORLD) if not job.endswith(f"-{rank}")]


@pytest.mark.parametrize(
    ("job", "what"),
    [
        ("stopped-1", "rank 1 ({host}): no sign of life for 3 s, last seen at step 3"),
        ("stopped-0", "rank 0 ({host}): no answer for 3 s, last seen at step 3"),
        (
            "killed-2",
            "rank 2 ({host}): its process ended without a word (killed, or out of memory), last seen at step ",
        ),
        (
            "killed-0",
            "rank 0 ({host}): its process ended without a word (killed, or out of memory), last seen at step ",
        ),
        ("asleep-1", "rank 1 ({host}): no progress for 3 s at step 3 (watch_main.py:"),
        ("raised-2", "rank 2 ({host}): ended by KeyError at step 3"),
    ],
)
def test_the_others_end_and_name_the_lost_rank(ends: dict[str, dict[str, Any]], job: str, what: str) -> None:
    for end in others(ends, job):
        # What a rank raises it may raise again: the job is not to be started again as it was.
        assert end["code"] == (1 if job.startswith("raised") else 3)
        assert what.format(host=socket.gethostname()) in end["sentence"]
        assert end["seconds"] < TIMEOUT + 12


def test_a_rank_that_stalls_ends_too(ends: dict[str, dict[str, Any]]) -> None:
    assert ends["asleep-1-1"]["code"] == 3 and "rank 1" in ends["asleep-1-1"]["sentence"]


def test_a_death_is_seen_at_once(ends: dict[str, dict[str, Any]]) -> None:
    assert max(end["seconds"] for end in others(ends, "killed-2")) < TIMEOUT


def test_a_clean_end_is_no_death(ends: dict[str, dict[str, Any]]) -> None:
    assert [(end["code"], end["sentence"]) for end in others(ends, "clean")] == [(0, None)] * WORLD
