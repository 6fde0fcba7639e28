"""Saving: collect, write, compare, commit. At once, or with the writing in a thread."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from pipeline.checkpoint.contents import Part, Snapshot, manifest_facts, rank_parts, shared_parts
from pipeline.checkpoint.files import Entry, Staging, sync_folder
from pipeline.checkpoint.manifest import (
    BEST,
    LATEST,
    MANIFEST,
    clear_leftovers,
    commit,
    point,
    pointed,
    prune_old,
    write_manifest,
)
from pipeline.checkpoint.restore import read_progress
from pipeline.errors import UserError
from pipeline.host.versions import versions
from pipeline.parallel.collectives import all_gather_object, raise_together, shared_errors
from pipeline.run import Progress, Run

SMALL_FILES = 2**20
"""Bytes set aside for files that hold no tensors of the model."""
FAILURES = (OSError, RuntimeError, SafetensorError)
"""What the libraries raise when a file cannot be written."""


Entries = dict[str, Entry]


@dataclass
class _Pending:
    """A save under way: first every rank writes its files, then rank 0 the manifest over all of them."""

    step: int
    facts: dict[str, Any]
    work: Future[Entries]
    """What this rank has to do now."""
    background: bool
    copied: Future[None]
    """Done when training may change what is being saved."""
    is_best: bool
    """Whether `best` is to name it."""
    written: bool = False
    """Whether all ranks have written their files."""


class Saver:
    """Writes the checkpoints of a run; every rank has one and calls it at the same places.

    Everything goes to a hidden folder. When all ranks have their files on disk, rank 0 writes the manifest over them,
    gives the folder its name, and replaces `latest`, and `best` where its evaluation was the best. A save that fails
    leaves none of them.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.folder = run.folder / "checkpoints"
        self._staging = Staging()
        self._versions = versions()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._removal: Future[None] | None = None

    def save(self, snapshot: Snapshot, *, background: bool = False) -> list[str]:
        """Saves `snapshot`, whose weights the engine still has; returns the checkpoints that became complete by it.

        With `background` it returns at once, `release` must come before the next change of the weights, and `poll` and
        `finish` commit. Collective; raises UserError on every rank when one cannot write.
        """
        done = self.finish()
        step = snapshot.progress.step
        # Collectives first, files after: a rank that cannot write must not leave the others waiting in DeepSpeed.
        facts = manifest_facts(self.run, snapshot, self._versions)
        collected = rank_parts(self.run, snapshot, self.folder, self._partial(step).name)
        everyone = all_gather_object(self.run.topology, (snapshot.cursors, sum(part.bytes for part in collected)))
        if self.run.is_main:
            collected += shared_parts(self.run, snapshot, [cursors for cursors, _ in everyone])
        with self._on_main(step):
            if self.run.is_main:
                self._make_room(self._partial(step), sum(size for _, size in everyone))
        copied: Future[None] = Future()
        ready = torch.cuda.current_stream().record_event() if self.run.device.type == "cuda" else None

        def work() -> Entries:
            try:
                parts = self._stage(collected, ready) if background else collected
            finally:
                copied.set_result(None)
            return {part.name: part.write(part.content, self._partial(step) / part.name) for part in parts}

        is_best = step > 0 and snapshot.progress.best_step == step
        self._pending = _Pending(step, facts, self._begin(work, background), background, copied, is_best)
        return done if background else [*done, *self.finish()]

    def release(self) -> None:
        """Waits until what is being saved is copied to host memory: from then on the weights may change."""
        if self._pending is not None:
            self._pending.copied.result()

    def poll(self) -> list[str]:
        """Takes a save in the background further. Collective; costs nothing while none is under way."""
        pending = self._pending
        if pending is None or not self._all(pending.work.done()):
            return []
        if not pending.written:
            self._complete(pending)
            return []
        return self.finish()

    def finish(self) -> list[str]:
        """Waits for the save that is under way, if any, to be complete. Collective; raises UserError."""
        pending = self._pending
        if pending is None:
            return []
        if not pending.written:
            self._complete(pending)
        self._result(pending)
        self._pending = None
        self.run.last_checkpoint = f"checkpoint-{pending.step}"
        return [self.run.last_checkpoint]

    def mend_best(self) -> None:
        """Makes `best` name the checkpoint that the run's progress knows as the best: a start that was cut off may have
        left it behind, or the run went back to an earlier step. Where that is not here, `best` names none, and the log
        says so. Collective; raises UserError."""
        path, progress = self.folder / BEST, self.run.progress
        with shared_errors(self.run.topology):
            if not self.run.is_main:
                return
            best = self.folder / f"checkpoint-{progress.best_step}"
            missing = _why_missing(best, progress)
            if missing is None and pointed(path) != best:
                point(path, best.name)
            elif missing is not None and (progress.best_step or path.is_file()):
                path.unlink(missing_ok=True)
                self.run.chosen["best"] = f"checkpoints/{BEST} names none: {missing}"

    def close(self, *, waits: bool = True) -> None:
        """Ends the thread. Unless it `waits`, a save that is under way is given up, which leaves a hidden folder."""
        self._thread.shutdown(wait=waits, cancel_futures=not waits)
        if not waits:
            return
        if self._removal is not None and self._removal.exception() is not None:
            warnings.warn(f"an old checkpoint was not removed: {self._removal.exception()}", stacklevel=2)

    def _partial(self, step: int) -> Path:
        return self.folder / f".checkpoint-{step}.partial"

    def _begin(self, work: Callable[[], Entries], background: bool) -> Future[Entries]:
        if background:
            return self._thread.submit(work)
        done: Future[Entries] = Future()
        try:
            done.set_result(work())
        except (UserError, *FAILURES) as error:
            done.set_exception(error)
        return done

    def _all(self, ready: bool) -> bool:
        """Whether all ranks are ready. Collective."""
        if self.run.topology.world == 1:
            return ready
        flag = torch.tensor(int(ready))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.run.topology.control)
        return bool(flag)

    def _complete(self, pending: _Pending) -> None:
        """Waits for the files of all ranks; then rank 0 begins with the rest. Collective; raises UserError."""
        files = self._result(pending)
        pending.written = True
        step, partial = pending.step, self._partial(pending.step)

        def commit_it() -> Entries:
            write_manifest(partial, pending.facts, files)
            commit(partial, self.folder / f"checkpoint-{step}", self.folder / LATEST)
            if pending.is_best:
                point(self.folder / BEST, f"checkpoint-{step}")
            self._removal = self._thread.submit(_remove, self._prune(step))
            return {}

        pending.work = self._begin(commit_it if self.run.is_main else dict, pending.background)

    def _prune(self, step: int) -> list[Path]:
        config, ends = self.run.config, self.run.progress.phase_ends
        try:
            return prune_old(self.folder, config.keep, step, config.keep_every, start=config.save_at_start, ends=ends)
        except OSError as error:
            # The save is complete; room that was not made shows when it is needed.
            warnings.warn(f"an old checkpoint was not removed: {error}", stacklevel=2)
            return []

    def _result(self, pending: _Pending) -> Entries:
        """What all ranks have written by now; UserError on all when one could not. Collective."""
        problem, local = None, {}
        try:
            local = pending.work.result()
        except UserError as error:
            problem = str(error)
        except FAILURES as error:
            problem = self._sentence(pending.step, error)
        everyone = all_gather_object(self.run.topology, (problem, local))
        problem = next((text for text, _ in everyone if text is not None), None)
        if problem is not None:
            self._pending = None
            if self.run.is_main:
                shutil.rmtree(self._partial(pending.step), ignore_errors=True)
            raise UserError(problem)
        return {file: entry for _, entries in everyone for file, entry in entries.items()}

    def _stage(self, parts: Sequence[Part], ready: Any) -> list[Part]:
        """Copies of what training changes, in host memory; `ready` is when the weights on a GPU are what is meant."""

        def copies() -> list[Part]:
            return [
                part if part.copied else dataclasses.replace(part, content=self._staging.copy(part.content, part.name))
                for part in parts
            ]

        if ready is None:
            return copies()
        with torch.cuda.stream(torch.cuda.Stream(self.run.device)) as _:
            stream = torch.cuda.current_stream()
            stream.wait_event(ready)
            staged = copies()
            stream.synchronize()
        return staged

    def _make_room(self, partial: Path, needed: int) -> None:
        needed += SMALL_FILES
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            sync_folder(self.run.folder)
            sync_folder(self.run.folder.parent)
        if self._removal is not None:
            wait([self._removal])
        clear_leftovers(self.folder)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(f"{free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB needed")
        partial.mkdir()

    @contextlib.contextmanager
    def _on_main(self, step: int) -> Iterator[None]:
        """Around what rank 0 does: when it fails nothing half-written stays, and all ranks stop with its reason."""
        problem = None
        try:
            yield
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = self._sentence(step, error)
        if problem is not None:
            shutil.rmtree(self._partial(step), ignore_errors=True)
        raise_together(self.run.topology, problem)

    def _sentence(self, step: int, error: BaseException) -> str:
        reason = " ".join(str(error).split())
        return f"checkpoint-{step} was not saved to {self.run.folder}: {reason}: make room there and resume"


def _why_missing(best: Path, progress: Progress) -> str | None:
    """Why a checkpoint is not the one that `progress` knows as the best; None where it is."""
    known = f"the best up to step {progress.step}"
    if not progress.best_step:
        return f"no evaluation up to step {progress.step} has found a best"
    if not (best / MANIFEST).is_file():
        return f"{best.name}, {known}, is not in {best.parent}"
    try:
        found = read_progress(best)
    except UserError as error:
        return str(error)
    # A run that went back saves the same steps again.
    facts = [(of.best_of, of.best_phase, of.best, of.best_step) for of in (found, progress)]
    return None if facts[0] == facts[1] else f"{best} is another one than {known}"


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)
