"""The run directory: opened for a run, and run.json in it."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import time
from typing import Any

from pipeline.checkpoint.manifest import clear_leftovers, named_checkpoints
from pipeline.config_file import save_config
from pipeline.errors import UserError
from pipeline.files.output import overwrite_json, write_json, writing
from pipeline.files.run_file import NAME, read_run_file
from pipeline.host.provenance import commit
from pipeline.host.versions import versions
from pipeline.parallel.collectives import broadcast_object, raise_together
from pipeline.run import Run
from pipeline.runtime.ranks import describe_devices


def open_folder(run: Run) -> None:
    """Makes the run directory ready for a run. Collective; raises UserError on every rank."""
    problem = None
    if run.is_main:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            taken = run.lock.acquire(run.folder)
            checkpoints = run.folder / "checkpoints"
            if taken and named_checkpoints(checkpoints):
                raise UserError(f"--output-dir {run.folder}: another run has saved there meanwhile: start again")
            clear_leftovers(checkpoints)
            # A start from scratch evaluates before its first step again; steps after the resumed one are run again.
            before, last = read_run_file(run.folder).done if run.progress.step else {}, run.progress.step
            run.done = {kind: tuple(step for step in steps if step <= last) for kind, steps in before.items()}
            save_config(run.config, run.folder / "config.yaml")
            write_json(run.folder / "ds_config.json", run.ds_config)
            write_run_file(run, "running")
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"--output-dir {run.folder}: {error.strerror or error}: name a folder that can be written"
        if problem is None and not os.access(run.folder, os.W_OK):
            problem = f"--output-dir {run.folder}: not writable: name another folder"
    raise_together(run.topology, problem)
    run.done = broadcast_object(run.topology, run.done)


@functools.cache
def _code() -> dict[str, Any]:
    """Of this process: what has been imported stays, whatever becomes of the files."""
    return {"versions": versions(), "commit": commit()}


def write_run_file(run: Run, status: str) -> None:
    """run.json: versions, commit, devices, command, status, last checkpoint and evaluation. Rank 0 only; raises
    RankError."""
    path = run.folder / NAME
    content = {
        "recipe": run.config.recipe,
        "status": status,
        "last_checkpoint": run.last_checkpoint,
        "evaluated": (),
        **run.done,
        "phases": [phase.name for phase in (run.phases.every if run.phases else (run.phase,))],
        "progress": dataclasses.asdict(run.progress),
        "command": sys.argv,
        **_code(),
        "machine": describe_devices(run.topology),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    with writing(path):
        try:
            write_json(path, content)
        except OSError:
            # On a full disk a status that is out of date would say that the run goes on.
            try:
                overwrite_json(path, content)
            except OSError:
                pass
            else:
                return
            raise
