"""SIGKILL of a random rank at random moments of training and saving, which no cleaning up survives.

Every restart goes on from a complete checkpoint on all ranks, and the run ends with the bits of one left alone.
"""

from __future__ import annotations

import functools
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoint.manifest import complete_checkpoints, problems
from tests.launch.comparing import differences
from tests.launch.forked import Forked, forked
from tests.launch.harness import Started
from tests.launch.kill_main import RANKS, words
from tests.launch.test_stop import latest, losses, steps
from tests.unsynced import SYNCED

STEPS_PER_KILL = 4
LONGEST = 0.9
"""Seconds from the first step of a start to a kill, at most: they are for about as many steps."""
STAGES = (1, 2, 3)
LAUNCHED = 5
"""Of so many kills one is of a rank of the real launcher, which then ends the others; the rest are of forked ranks."""


def kill(
    folder: Path, stage: int, last: int, draw: random.Random, more: list[str], start: Callable[..., Started | Forked]
) -> str:
    """Starts or resumes a run, and kills a rank at a random moment after its first new step; says what that met: a
    save, the removal of an old checkpoint, a step, or nothing any more."""
    before = steps(folder)
    checkpoints = folder / "checkpoints"
    started = start(RANKS, "pipeline", "train", *words(stage, last, folder, *more))
    # A resume drops the rows of steps that are run again.
    started.wait_until(
        lambda: (checkpoints / "latest").exists() and bool(steps(folder)) and started.text().count("step ")
    )
    time.sleep(draw.uniform(0, LONGEST))
    victim = draw.randrange(RANKS)
    if started.poll() is None:
        started.rank(victim).kill()
    aside = {path.suffix for path in checkpoints.glob(".checkpoint-*")}
    code = started.end()
    if steps(folder) and steps(folder)[-1] >= last and code == 0:
        return "nothing"
    assert code != 0, started.text()
    assert "Traceback" not in started.text(), started.text()
    for checkpoint in complete_checkpoints(checkpoints):
        assert problems(checkpoint, hashes=True) == [], "what has its name is whole"
    assert latest(folder) in complete_checkpoints(checkpoints)
    print(f"rank {victim} at step {steps(folder)[-1:]} (from {before[-1:]}), beside checkpoints {aside}", flush=True)
    return "save" if aside & {".partial", ".replaced"} else "removal" if ".removed" in aside else "step"


def survive(kills: int, folder: Path, seed: int) -> Counter[str]:
    """Returns how often a kill met what."""
    draw = random.Random(seed)
    share = dict.fromkeys(STAGES, 0)
    for index in range(kills):
        share[STAGES[index % len(STAGES)]] += 1
    lasts = {stage: 3 + STEPS_PER_KILL * count for stage, count in share.items()}
    met: Counter[str] = Counter()
    for stage, count in share.items():
        for index in range(count):
            more = ["--async-save"] if index % 2 else []
            # Else there would hardly be a save to meet.
            start = functools.partial(Forked, **{SYNCED: "1"}) if met.total() % LAUNCHED else Started
            met[kill(folder / f"killed{stage}", stage, lasts[stage], draw, more, start)] += 1
            print(f"zero{stage}, {index + 1} of {count}: {dict(met)}", flush=True)
    assert met["save"] >= kills // 10 and met["step"] >= kills // 10 and met["nothing"] <= kills // 5, met
    pairs = [f"{stage}:{last}" for stage, last in lasts.items()]
    done = forked(RANKS, "tests.launch.kill_main", str(folder), *pairs, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in STAGES:
        straight, killed = folder / f"straight{stage}", folder / f"killed{stage}"
        assert losses(killed) == losses(straight)
        assert differences(latest(killed), latest(straight)) == []
        state = [json.loads((latest(run) / "trainer_state.json").read_text()) for run in (killed, straight)]
        assert {**state[0], "elapsed": 0} == {**state[1], "elapsed": 0}
    return met


@pytest.mark.timeout(600)
def test_ten_kills_cost_no_bit(tmp_path: Path) -> None:
    survive(10, tmp_path, seed=4)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_kills_cost_no_bit(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    for what, count in survive(100, tmp_path, seed=5).items():
        record_property(f"kills that met a {what}", count)


def survive_switches(kills: int, folder: Path, seed: int) -> Counter[str]:
    """Kills around the switches of runs of three phases; returns how often a kill met what."""
    done = forked(
        1, "tests.launch.phases_kill_main", str(folder), str(kills), str(seed), timeout=60 + 15 * kills, **{SYNCED: "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "result.json").read_text())
    assert {run: wrong for run, wrong in found["wrong"].items() if wrong} == {}
    met = Counter(found["met"])
    assert met.total() >= kills and min(met[f"{place} the switch"] for place in ("before", "in")) >= 1, met
    return met


@pytest.mark.timeout(300)
def test_eight_kills_around_switches_of_phases_cost_no_bit(tmp_path: Path) -> None:
    survive_switches(8, tmp_path, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_around_switches_of_phases_cost_no_bit(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    for what, count in survive_switches(50, tmp_path, seed=2).items():
        record_property(f"kills that came {what}", count)
