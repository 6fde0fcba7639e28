"""Started by test_watch.py: jobs of three gloo ranks, one of which dies, stalls or is stopped.

Usage: watch_main OUT. Writes OUT/result.json: for every job and rank, its exit code, sentence and seconds.
One process that forks the ranks of all jobs, because importing torch takes longer than the jobs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from pipeline.parallel.topology import Topology
from pipeline.runtime.heartbeat import Diagnosis, HeartbeatMonitor
from tests.launch.harness import free_port

WORLD = 3
TIMEOUT, INTERVAL = 3.0, 0.2
LAST = 5
JOBS = ("clean", "stopped-1", "stopped-0", "killed-2", "killed-0", "asleep-1", "raised-2")


def rank_of(job: str, rank: int, out: Path) -> NoReturn:
    begun = time.monotonic()

    def exit_now(sentence: str | None, code: int) -> NoReturn:
        said = {"code": code, "sentence": sentence, "seconds": time.monotonic() - begun}
        (out / f"{job}-{rank}.json").write_text(json.dumps(said))
        os._exit(code)

    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    what, _, victim = job.partition("-")
    topology = Topology(rank, WORLD, local_rank=rank)

    def fail(diagnosis: Diagnosis | None, should_report: bool = False) -> NoReturn:
        exit_now(None, 9) if diagnosis is None else exit_now(diagnosis.reason, diagnosis.code)

    with HeartbeatMonitor(topology, timeout=TIMEOUT, interval=INTERVAL, on_failure=fail) as monitor:
        for step in range(1, LAST + 1):
            monitor.at(f"step {step}")
            time.sleep(2 * INTERVAL)  # every step is heard of
            if step == 3 and victim == str(rank):
                begun = time.monotonic()
                if what in ("stopped", "killed"):
                    os.kill(os.getpid(), signal.SIGSTOP if what == "stopped" else signal.SIGKILL)
                elif what == "asleep":
                    time.sleep(60)
                else:
                    with contextlib.suppress(KeyError), monitor:
                        raise KeyError("no such thing")
                    exit_now(None, 1)
            try:
                dist.all_reduce(torch.ones(1))
            except RuntimeError:
                fail(monitor.diagnosis(10))
        if rank == 1:
            time.sleep(2)  # at a clean end the others are not held to have died, nor this one to be late
    exit_now(None, 0)


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    processes: dict[tuple[str, int], int] = {}
    for job in JOBS:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        for rank in range(WORLD):
            pid = os.fork()
            if not pid:
                rank_of(job, rank, out)
            processes[job, rank] = pid
    victims = {(job, int(job[-1])) for job in JOBS if job.startswith("stopped")}
    codes = {key: os.waitpid(pid, 0)[1] for key, pid in processes.items() if key not in victims}
    for key in victims:
        os.kill(processes[key], signal.SIGKILL)
        os.waitpid(processes[key], 0)
    result = {}
    for (job, rank), status in codes.items():
        file = out / f"{job}-{rank}.json"
        said = json.loads(file.read_text()) if file.exists() else {"sentence": None, "seconds": 0.0}
        result[f"{job}-{rank}"] = {**said, "code": os.waitstatus_to_exitcode(status)}
    (out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
