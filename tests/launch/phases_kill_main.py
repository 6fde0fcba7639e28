"""Started by test_kill.py: runs of three phases on two ranks, of which one is killed again and again around a switch.

Usage: phases_kill_main OUT KILLS SEED. Writes OUT/result.json. One process that forks the ranks, because importing
torch takes longer than a run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NoReturn

import pipeline.checkpoint.save
import pipeline.job
import pipeline.systems
from pipeline.checkpoint.manifest import complete_checkpoints, problems
from pipeline.cli import main as mnemos
from pipeline.files.run_file import read_run_file
from tests import toy_systems
from tests.launch.harness import free_port
from tests.launch.phases_main import same, threshold_of
from tests.launch.phases_reference import reference
from tests.launch.test_stop import latest, steps
from tests.toy_systems.phased import phased

assert pipeline.job and pipeline.checkpoint.save and pipeline.systems  # what the ranks need is imported here
WORLD = 2
STAGES = (1, 3, 2, 0)
PER_RUN = 4
"""Kills of one run: two a switch."""
WAIT = 60.0


def rank_of(rank: int, port: int, words: list[str], log: Path) -> NoReturn:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    with log.open("ab") as handle:
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
    code = 1
    try:
        code = mnemos(words)
    finally:
        os._exit(code)


class Job:
    """Two ranks of a run."""

    def __init__(self, words: list[str], log: Path) -> None:
        port = free_port()
        self.pids: list[int] = []
        self.codes: dict[int, int] = {}
        for rank in range(WORLD):
            pid = os.fork()
            if not pid:
                rank_of(rank, port, words, log)
            self.pids.append(pid)

    def ended(self) -> bool:
        """Whether all ranks have."""
        for pid in self.pids:
            if pid not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == WORLD

    def wait(self) -> list[int]:
        """Exit codes by rank."""
        end = time.monotonic() + WAIT
        while not self.ended():
            if time.monotonic() > end:
                for pid in self.pids:
                    if pid not in self.codes:
                        os.kill(pid, signal.SIGKILL)
                raise TimeoutError("ranks do not end")
            time.sleep(0.01)
        return [self.codes[pid] for pid in self.pids]


def words(folder: Path, stage: int, threshold: float, pause: float) -> list[str]:
    return [
        "train", "phased_tiny", "--output-dir", str(folder), "--zero", f"zero{stage}", "--grad-accum", "2",
        "--save-every", "2", "--keep", "3", "--model.threshold", repr(threshold), "--model.pause", str(pause),
    ]  # fmt: skip


def at(folder: Path) -> tuple[int, bool]:
    """The step of the newest checkpoint, and whether it ended a phase; (0, False) without one."""
    if not (folder / "checkpoints" / "latest").exists():
        return 0, False
    state = json.loads((latest(folder) / "trainer_state.json").read_text())
    return state["step"], state["phase_done"]


def kill(folder: Path, log: Path, command: list[str], switch: int, draw: random.Random) -> str:
    """Kills a rank at a random moment from a step before the switch on; says where the run then stood."""
    log.unlink(missing_ok=True)
    job = Job(command, log)
    # Rows may be of an earlier start; this one has begun when it says what it chose.
    while not job.ended() and not (
        log.exists() and "phased_tiny: " in log.read_text() and steps(folder) and steps(folder)[-1] >= switch - 1
    ):
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.8))
    if job.ended():
        assert job.wait() == [0, 0], log.read_text()[-3000:]
        return "too late"
    victim = job.pids[draw.randrange(WORLD)]
    os.kill(victim, signal.SIGKILL)
    codes = job.wait()
    if 0 in codes:
        # The others had left the run, which is over, when this one was killed on its way out.
        assert read_run_file(folder).status == "finished", codes
        return "too late"
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
    for checkpoint in complete_checkpoints(folder / "checkpoints"):
        assert problems(checkpoint, hashes=True) == []
    (step, done), rows = at(folder), steps(folder)
    if step < switch:
        return "before the switch"
    return "in the switch" if step == switch and done and rows[-1] <= switch else "behind the switch"


def main() -> None:
    out, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    toy_systems.add()
    draw = random.Random(seed)
    base = phased(out)
    threshold = threshold_of(base)
    truth = reference(base, threshold)
    switches, last = (truth.end_of("A"), truth.end_of("B")), len(truth.rows)
    met: Counter[str] = Counter()
    wrong: dict[str, list[str]] = {}
    for run in range(-(-kills // PER_RUN)):
        stage = STAGES[run % len(STAGES)]
        killed, straight = out / f"killed{run}", out / f"straight{stage}"
        log = out / f"run{run}.log"
        for switch in switches:
            for _ in range(PER_RUN // len(switches)):
                met[kill(killed, log, words(killed, stage, threshold, 0.05), switch, draw)] += 1
        for folder in (killed, straight):
            if not folder.is_dir() or read_run_file(folder).status != "finished":
                codes = Job(words(folder, stage, threshold, 0.0), log).wait()
                assert codes == [0, 0], log.read_text()[-3000:]
        wrong[f"run {run}, zero{stage}"] = same(straight, killed, last)
    (out / "result.json").write_text(json.dumps({"met": met, "wrong": wrong}))


if __name__ == "__main__":
    main()
