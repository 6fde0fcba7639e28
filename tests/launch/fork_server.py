"""Started by forked.py: forks the ranks of jobs from one process that has imported what ranks need.

Usage: fork_server SOCKET, a file descriptor. A line of JSON is a request, and is answered by one.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import signal
import socket
import sys
import time
from typing import Any

from tests.unsynced import SYNCED, leave_files_to_the_cache, sync_files

GRACE = 1.0
"""Seconds between the end of a rank that failed and SIGTERM to the others: the interval of DeepSpeed's launcher."""
TERMINATED = 30.0
"""Seconds after which what SIGTERM did not end is killed, as DeepSpeed's launcher does."""
HEAVY = (
    "deepspeed", "numpy", "transformers", "transformers.models.olmo.modeling_olmo",
    "transformers.models.olmo2.modeling_olmo2", "matplotlib.backends.backend_agg", "matplotlib.figure", "psutil",
)  # fmt: skip
"""What ranks import when they need it, besides the package."""


def preload() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    import pipeline

    for module in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
        if not module.name.endswith("__main__") and not module.name.startswith("pipeline._native"):
            importlib.import_module(module.name)
    # Half a million objects that stay: without them a collection takes a twentieth, and DeepSpeed asks for many.
    gc.collect()
    gc.freeze()


def run_rank(words: list[str]) -> int:
    """What `python -m WORDS` does from here on; the interpreter then ends as it always does."""
    import numpy
    from deepspeed.utils import nvtx

    # Marks for a profiler of GPUs, around half a million calls of a job in ZeRO-3.
    nvtx.enable_nvtx = False
    if os.environ.get(SYNCED):
        sync_files()
    # As in processes that have nothing in common.
    random.seed()
    numpy.random.seed()
    module, *arguments = words
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def supervise(ranks: dict[int, int]) -> int:
    """Waits for ranks, given by process id, and ends the others of one that fails; returns the job's exit code."""
    code, failed_at, asked, alive = 0, 0.0, False, set(ranks)
    while alive:
        for pid in sorted(alive):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                alive.discard(pid)
                last = os.waitstatus_to_exitcode(status)
                if last and not code:
                    code, failed_at = last, time.monotonic()
        passed = time.monotonic() - failed_at
        if code and not asked and passed > GRACE:
            asked = True
            for pid in alive:
                os.kill(pid, signal.SIGTERM)
        if code and passed > GRACE + TERMINATED:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return code


class Server:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.jobs: list[int] = []
        self.codes: dict[int, int] = {}

    def serve(self) -> int | None:
        """Answers requests. Returns the exit code in a rank, and None in the server, once nobody asks any more."""
        for line in self.connection.makefile("r"):
            request = json.loads(line)
            if "words" in request:
                found = self.start(**request)
                if isinstance(found, int):
                    return found
                answer = found
            else:
                answer = {"code": self.poll(request["pid"])}
            self.connection.sendall(json.dumps(answer).encode() + b"\n")
        return None

    def poll(self, job: int) -> int | None:
        if job not in self.codes:
            found, status = os.waitpid(job, os.WNOHANG)
            if found:
                self.codes[job] = os.waitstatus_to_exitcode(status)
        return self.codes.get(job)

    def close(self) -> None:
        """Ends the jobs that nobody waits for any more."""
        for job in self.jobs:
            if self.poll(job) is None:
                os.killpg(job, signal.SIGKILL)

    def start(
        self, words: list[str], ranks: int, port: int, output: str, errors: str, variables: dict[str, str]
    ) -> dict[str, Any] | int:
        """The process id of a job and those of its ranks; in a rank, its exit code."""
        reading, writing = os.pipe()
        job = os.fork()
        if job:
            self.jobs.append(job)
            os.close(writing)
            with os.fdopen(reading) as told:
                return {"pid": job, "ranks": json.loads(told.readline())}
        os.setsid()
        self.connection.close()
        os.close(reading)
        for path, descriptor in ((output, 1), (errors, 2)):
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(opened, descriptor)
            os.close(opened)
        os.environ.update(variables)
        pids: dict[int, int] = {}
        for rank in range(ranks):
            pid = os.fork()
            if not pid:
                os.close(writing)
                if ranks > 1:
                    os.environ.update(
                        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks),
                        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                    )  # fmt: skip
                    words = [words[0], f"--local_rank={rank}", *words[1:]]
                return run_rank(words)
            pids[pid] = rank
        os.write(writing, json.dumps(list(pids)).encode() + b"\n")
        os.close(writing)
        os._exit(supervise(pids) & 0xFF)


def main() -> None:
    leave_files_to_the_cache()
    preload()
    server = Server(socket.socket(fileno=int(sys.argv[1])))
    code = server.serve()
    if code is None:
        server.close()
    sys.exit(code)


if __name__ == "__main__":
    main()
