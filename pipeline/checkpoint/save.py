"""Saving: collect, write, agree, commit. At once, or with the writing in a thread."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.archive import save_config
from pipeline.checkpoint.carry import carry_content
from pipeline.checkpoint.files import Entry, Jobs, Staging, shard, small, tensor_bytes
from pipeline.checkpoint.manifest import LATEST, clear_leftovers, commit, remove_old, write_manifest
from pipeline.checkpoint.state import TRAINABLE, TRAINER_STATE
from pipeline.errors import UserError
from pipeline.parallel.agreement import agree, from_all
from pipeline.parallel.weights import full_state
from pipeline.run import Progress, Run, versions
from pipeline.system import Carry

SMALL_FILES = 2**20
"""Bytes set aside for files that hold no tensors of the model."""


@dataclass(frozen=True)
class Moment:
    """A completed step: what a checkpoint of it holds besides what the engine does."""

    progress: Progress
    cursors: dict[str, Any]
    """The loader's `state_dict`: this rank's streams."""
    rng: dict[str, Any]
    carries: Sequence[Carry]


@dataclass(frozen=True)
class _Pending:
    step: int
    facts: dict[str, Any]
    entries: Future[dict[str, Entry]]


class Saver:
    """Writes the checkpoints of a run; every rank has one and calls it at the same places.

    Everything goes to a hidden folder. When all ranks have their files on disk, rank 0 writes the manifest over them,
    gives the folder its name, and replaces `latest`. A save that fails leaves neither.
    """

    def __init__(self, run: Run, streams: Sequence[Sequence[int]]) -> None:
        self.run, self.streams = run, streams
        self.folder = run.folder / "checkpoints"
        self._staging = Staging()
        self._thread: ThreadPoolExecutor | None = None
        self._pending: _Pending | None = None

    def save(self, moment: Moment, *, background: bool = False) -> list[str]:
        """Saves `moment`, whose weights the engine still has; returns the checkpoints that became complete by it.

        With `background` it returns when everything is copied to host memory; `poll` and `finish` commit. Collective;
        raises UserError on every rank when one cannot write.
        """
        done = self.finish()
        step = moment.progress.step
        partial = self.folder / f".checkpoint-{step}.partial"
        # Collectives first, files after: a rank that cannot write must not leave the others waiting in DeepSpeed.
        facts = _facts(self.run, moment)
        jobs, size = self._collect(moment, facts, partial.name, copied=background)
        needed = sum(from_all(self.run.topology, size))
        self._attempt(step, lambda: self._make_room(partial, needed))
        if background:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            entries = self._thread.submit(_write, jobs, partial)
        else:
            entries = Future()
            try:
                entries.set_result(_write(jobs, partial))
            except (OSError, RuntimeError, SafetensorError) as error:
                entries.set_exception(error)
        self._pending = _Pending(step, facts, entries)
        return done if background else [*done, *self.finish()]

    def poll(self) -> list[str]:
        """Commits a save whose files are on disk on all ranks. Collective; costs nothing while none is under way."""
        if self._pending is None:
            return []
        if self.run.topology.world > 1:
            ready = torch.tensor(int(self._pending.entries.done()))
            dist.all_reduce(ready, op=dist.ReduceOp.MIN, group=self.run.topology.control)
            if not int(ready):
                return []
        elif not self._pending.entries.done():
            return []
        return self.finish()

    def finish(self) -> list[str]:
        """Waits for the save that is under way, if any, and commits it. Collective; raises UserError."""
        if self._pending is None:
            return []
        pending, self._pending = self._pending, None
        step, name = pending.step, f"checkpoint-{pending.step}"
        partial = self.folder / f".{name}.partial"
        problem, mine = None, {}
        try:
            mine = pending.entries.result()
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = self._sentence(step, error)
        everyone = from_all(self.run.topology, (problem, mine))
        problem = next((text for text, _ in everyone if text is not None), None)
        files = {file: entry for _, entries in everyone for file, entry in entries.items()}

        def give_it_its_name() -> None:
            if problem is not None:
                raise UserError(problem)
            write_manifest(partial, pending.facts, files)
            commit(partial, self.folder / name, self.folder / LATEST)
            remove_old(self.folder, self.run.config.keep, step)

        self._attempt(step, give_it_its_name)
        self.run.last_checkpoint = name
        return [name]

    def close(self) -> None:
        """Ends the thread; a save that is under way is waited for and not committed."""
        if self._thread is not None:
            self._thread.shutdown()

    def _collect(self, moment: Moment, facts: dict[str, Any], tag: str, *, copied: bool) -> tuple[Jobs, int]:
        """What this rank writes, by file name, and its bytes. Collective."""
        run = self.run
        assert run.engine is not None and run.phase is not None
        keep: Callable[..., Any] = self._staging.copy if copied else lambda value, *_: value
        jobs: Jobs = {}
        size = SMALL_FILES
        names = [name for group in run.phase.groups for name in group.parameters]
        trainable = full_state(run.engine.module, names, lambda name, value: self._staging.copy(value, TRAINABLE, name))
        cursors = _merged(from_all(run.topology, moment.cursors))
        if run.is_main:
            progress, config = dataclasses.asdict(moment.progress), run.config
            jobs[TRAINABLE] = small(lambda path: save_file(trainable, path))
            jobs[TRAINER_STATE] = small(lambda path: _write_json(path, progress))
            jobs["loader.json"] = small(lambda path: _write_json(path, cursors))
            jobs["config.yaml"] = small(lambda path: save_config(config, path))
            size += tensor_bytes(trainable)
        rank = f"{run.topology.rank:05d}"
        carried, layout = carry_content(moment.carries, self.streams, run.topology)
        carried = keep(carried, "carry")
        jobs[f"carry-{rank}.safetensors"] = small(lambda path: save_file(carried, path, metadata=layout))
        jobs[f"rng-{rank}.pt"] = small(lambda path: torch.save(moment.rng, path))
        size += tensor_bytes(carried)
        for path, content in run.engine.collect(self.folder, tag).items():
            jobs[path.name] = shard(keep(content, path.name))
            size += tensor_bytes(content)
        if copied and run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        return jobs, size

    def _make_room(self, partial: Path, needed: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(self.folder)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(f"{free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB needed")
        partial.mkdir()

    def _attempt(self, step: int, part: Callable[[], None]) -> None:
        """Rank 0 does `part`; when it fails nothing half-written stays, and all ranks stop with its reason."""
        problem = None
        if self.run.is_main:
            try:
                part()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = self._sentence(step, error)
            if problem is not None:
                shutil.rmtree(self.folder / f".checkpoint-{step}.partial", ignore_errors=True)
        agree(self.run.topology, problem)

    def _sentence(self, step: int, error: Exception) -> str:
        reason = " ".join(str(error).split())
        return f"checkpoint-{step} was not saved to {self.run.folder}: {reason}: make room there and resume"


def _write(jobs: Jobs, folder: Path) -> dict[str, Entry]:
    return {name: job(folder / name) for name, job in jobs.items()}


def _facts(run: Run, moment: Moment) -> dict[str, Any]:
    assert run.engine is not None
    return {
        "step": moment.progress.step,
        "recipe": run.config.recipe,
        "system": run.config.model.system,
        "world": run.topology.world,
        "data": run.topology.data,
        "sequence": run.topology.sequence,
        "zero_stage": run.engine.stage,
        "global_batch": run.config.batch_size * run.config.grad_accum * run.topology.data,
        "frozen": run.frozen,
        "versions": versions(),
        "data_fingerprint": moment.cursors.get("fingerprint"),
    }


def _merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    streams = {key: value for state in states for key, value in state.get("streams", {}).items()}
    return {**states[0], "streams": streams}


def _write_json(path: Path, content: Any) -> None:
    with path.open("w") as handle:
        json.dump(content, handle, indent=1)
        handle.write("\n")
