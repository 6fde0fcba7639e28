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

from pipeline.archive import save_config
from pipeline.checkpoint.carry import carry_content
from pipeline.checkpoint.files import Entry, Jobs, Staging, shard, small, tensor_bytes, tensors
from pipeline.checkpoint.manifest import LATEST, clear_leftovers, commit, retire_old, write_manifest
from pipeline.checkpoint.state import TRAINABLE, TRAINER_STATE
from pipeline.errors import UserError
from pipeline.parallel.agreement import agree, from_all
from pipeline.run import Progress, Run, versions
from pipeline.system import Carry

SMALL_FILES = 2**20
"""Bytes set aside for files that hold no tensors of the model."""
FAILURES = (OSError, RuntimeError, SafetensorError)
"""What the libraries raise when a file cannot be written."""


@dataclass(frozen=True)
class Moment:
    """A completed step: what a checkpoint of it holds besides what the engine does."""

    progress: Progress
    cursors: dict[str, Any]
    """The loader's `state_dict`: this rank's streams."""
    rng: dict[str, Any]
    carries: Sequence[Carry]


Entries = dict[str, Entry]


@dataclass
class _Pending:
    """A save under way: first every rank writes its files, then rank 0 the trained weights out of all of them."""

    step: int
    facts: dict[str, Any]
    work: Future[Entries]
    """What this rank has to do now."""
    background: bool
    files: Entries | None = None
    """What all ranks wrote; None until all have."""


class Saver:
    """Writes the checkpoints of a run; every rank has one and calls it at the same places.

    Everything goes to a hidden folder. When all ranks have their files on disk, rank 0 writes the manifest over them,
    gives the folder its name, and replaces `latest`. A save that fails leaves neither.
    """

    def __init__(self, run: Run, streams: Sequence[Sequence[int]]) -> None:
        self.run, self.streams = run, streams
        self.folder = run.folder / "checkpoints"
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._removal: Future[None] | None = None

    def save(self, moment: Moment, *, background: bool = False) -> list[str]:
        """Saves `moment`, whose weights the engine still has; returns the checkpoints that became complete by it.

        With `background` it returns when everything is copied to host memory; `poll` and `finish` commit. Collective;
        raises UserError on every rank when one cannot write.
        """
        done = self.finish()
        step = moment.progress.step
        # Collectives first, files after: a rank that cannot write must not leave the others waiting in DeepSpeed.
        facts = _facts(self.run, moment)
        jobs, size = self._collect(moment, self._partial(step).name, copied=background)
        needed = sum(from_all(self.run.topology, size))
        self._on_main(step, lambda: self._make_room(self._partial(step), needed))
        work = self._begin(lambda: _write(jobs, self._partial(step)), background)
        self._pending = _Pending(step, facts, work, background)
        return done if background else [*done, *self.finish()]

    def poll(self) -> list[str]:
        """Takes a save in the background further. Collective; costs nothing while none is under way."""
        pending = self._pending
        if pending is None or not self._all(pending.work.done()):
            return []
        if pending.files is None:
            self._gather(pending)
            return []
        return self.finish()

    def finish(self) -> list[str]:
        """Waits for the save that is under way, if any, and commits it. Collective; raises UserError."""
        pending = self._pending
        if pending is None:
            return []
        if pending.files is None:
            self._gather(pending)
        self._pending = None
        step, name = pending.step, f"checkpoint-{pending.step}"
        files = {**(pending.files or {}), **self._result(pending)}

        def commit_it() -> None:
            write_manifest(self._partial(step), pending.facts, files)
            commit(self._partial(step), self.folder / name, self.folder / LATEST)
            retired = retire_old(self.folder, self.run.config.keep, step)
            self._removal = self._thread.submit(_remove, retired)

        self._on_main(step, commit_it)
        self.run.last_checkpoint = name
        return [name]

    def close(self) -> None:
        """Ends the thread; a save that is under way is waited for and not committed."""
        self._thread.shutdown()

    def _partial(self, step: int) -> Path:
        return self.folder / f".checkpoint-{step}.partial"

    def _begin(self, work: Callable[[], Entries], background: bool) -> Future[Entries]:
        if background:
            return self._thread.submit(work)
        done: Future[Entries] = Future()
        try:
            done.set_result(work())
        except FAILURES as error:
            done.set_exception(error)
        return done

    def _all(self, ready: bool) -> bool:
        """Whether all ranks are ready. Collective."""
        if self.run.topology.world == 1:
            return ready
        flag = torch.tensor(int(ready))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.run.topology.control)
        return bool(flag)

    def _gather(self, pending: _Pending) -> None:
        """Waits for the files of all ranks; then rank 0 begins with the trained weights. Collective."""
        files = self._result(pending)
        pending.files = files
        step, engine, phase = pending.step, self.run.engine, self.run.phase
        assert engine is not None and phase is not None
        names = [name for group in phase.groups for name in group.parameters]

        def write_weights() -> Entries:
            if not self.run.is_main:
                return {}
            # Of the shards that are on disk: gathering them again would hold up training.
            content = engine.trained_weights(self._partial(step), {**pending.facts, "files": files}, names)
            return {TRAINABLE: tensors(content)(self._partial(step) / TRAINABLE)}

        pending.work = self._begin(write_weights, pending.background)

    def _result(self, pending: _Pending) -> Entries:
        """What all ranks have written by now; UserError on all when one could not. Collective."""
        problem, mine = None, {}
        try:
            mine = pending.work.result()
        except UserError as error:
            problem = str(error)
        except FAILURES as error:
            problem = self._sentence(pending.step, error)
        everyone = from_all(self.run.topology, (problem, mine))
        problem = next((text for text, _ in everyone if text is not None), None)
        if problem is not None:
            self._pending = None
            if self.run.is_main:
                shutil.rmtree(self._partial(pending.step), ignore_errors=True)
            raise UserError(problem)
        return {file: entry for _, entries in everyone for file, entry in entries.items()}

    def _collect(self, moment: Moment, tag: str, *, copied: bool) -> tuple[Jobs, int]:
        """What this rank writes, by file name, and its bytes. Collective."""
        run = self.run
        assert run.engine is not None and run.phase is not None
        keep: Callable[..., Any] = self._staging.copy if copied else lambda value, *_: value
        jobs: Jobs = {}
        size = SMALL_FILES
        cursors = _merged(from_all(run.topology, moment.cursors))
        if run.is_main:
            progress, config = dataclasses.asdict(moment.progress), run.config
            jobs[TRAINER_STATE] = small(lambda path: _write_json(path, progress))
            jobs["loader.json"] = small(lambda path: _write_json(path, cursors))
            jobs["config.yaml"] = small(lambda path: save_config(config, path))
            size += run.engine.trained_bytes(name for group in run.phase.groups for name in group.parameters)
        rank = f"{run.topology.rank:05d}"
        carried, layout = carry_content(moment.carries, self.streams, run.topology)
        carried = keep(carried, "carry")
        jobs[f"carry-{rank}.safetensors"] = tensors(carried, layout)
        jobs[f"rng-{rank}.pt"] = shard(moment.rng)
        size += tensor_bytes(carried)
        for path, content in run.engine.collect(self.folder, tag).items():
            jobs[path.name] = shard(keep(content, path.name))
            size += tensor_bytes(content)
        if copied and run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        return jobs, size

    def _make_room(self, partial: Path, needed: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._removal is not None:
            self._removal.result()
        clear_leftovers(self.folder)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(f"{free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB needed")
        partial.mkdir()

    def _on_main(self, step: int, part: Callable[[], None]) -> None:
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
                shutil.rmtree(self._partial(step), ignore_errors=True)
        agree(self.run.topology, problem)

    def _sentence(self, step: int, error: BaseException) -> str:
        reason = " ".join(str(error).split())
        return f"checkpoint-{step} was not saved to {self.run.folder}: {reason}: make room there and resume"


def _write(jobs: Jobs, folder: Path) -> Entries:
    return {name: job(folder / name) for name, job in jobs.items()}


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)


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
