"""SIGKILL of a random rank at random moments of training and saving, which no cleaning up survives.

Every restart goes on from a complete checkpoint on all ranks, and the run ends with the bits of one left alone.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from pipeline.checkpoint.manifest import complete_checkpoints, problems
from tests.launch.comparing import differences
from tests.launch.harness import Started, launch
from tests.launch.test_stop import latest, losses, steps

RECIPE = [
    "pipeline", "train", "miras_tiny", "--sequence-length", "128", "--batch-size", "1", "--grad-accum", "2",
    "--evaluation.steps", "1", "--eval-every", "0", "--save-every", "1", "--report.no-plots",
]  # fmt: skip
STEPS_PER_KILL = 6
STAGES = (1, 2, 3)


def words(stage: int, last: int, folder: Path, *more: str) -> list[str]:
    return [*RECIPE, "--zero", f"zero{stage}", "--steps", str(last), "--output-dir", str(folder), *more]


def kill(folder: Path, stage: int, last: int, draw: random.Random, more: list[str]) -> str:
    """Starts or resumes a run, and kills a rank at a random moment after its first new step; says what it met."""
    before = steps(folder)
    checkpoints = folder / "checkpoints"
    started = Started(2, *words(stage, last, folder, *more))
    # A resume drops the rows of steps that are run again.
    started.wait_until(
        lambda: (checkpoints / "latest").exists() and bool(steps(folder)) and started.text().count("step ")
    )
    time.sleep(draw.uniform(0, 1.5))
    victim = draw.randrange(2)
    if started.process.poll() is None:
        started.rank(victim).kill()
    met = [path.name for path in checkpoints.glob(".checkpoint-*")]
    code = started.end()
    if steps(folder) and steps(folder)[-1] >= last and code == 0:
        return "finished before it was killed"
    assert code != 0, started.text()
    assert "Traceback" not in started.text(), started.text()
    for checkpoint in complete_checkpoints(checkpoints):
        assert problems(checkpoint, hashes=True) == [], "what has its name is whole"
    assert latest(folder) in complete_checkpoints(checkpoints)
    return f"rank {victim} at step {steps(folder)[-1:]} (from {before[-1:]}), {met or 'no save'} under way"


def survive(kills: int, folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    share = dict.fromkeys(STAGES, 0)
    for index in range(kills):
        share[STAGES[index % len(STAGES)]] += 1
    for stage, count in share.items():
        last = 3 + STEPS_PER_KILL * count
        straight, killed = folder / f"straight{stage}", folder / f"killed{stage}"
        done = launch(2, *words(stage, last, straight))
        assert done.returncode == 0, done.stdout + done.stderr
        for index in range(count):
            more = ["--async-save"] if index % 2 else []
            print(f"zero{stage}, kill {index + 1}: {kill(killed, stage, last, draw, more)}", flush=True)
        done = launch(2, *words(stage, last, killed, "--resume", "must"))
        assert done.returncode == 0, done.stdout + done.stderr
        assert losses(killed) == losses(straight)
        assert differences(latest(killed), latest(straight)) == []
        state = [json.loads((latest(run) / "trainer_state.json").read_text()) for run in (killed, straight)]
        assert {**state[0], "elapsed": 0} == {**state[1], "elapsed": 0}


@pytest.mark.timeout(600)
def test_ten_kills_cost_no_bit(tmp_path: Path) -> None:
    survive(10, tmp_path, seed=4)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_kills_cost_no_bit(tmp_path: Path) -> None:
    survive(100, tmp_path, seed=5)
