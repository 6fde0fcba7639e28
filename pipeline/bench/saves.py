"""What `bench resume` times: steps, saves and loads of a run, and plain files of the same size. All collective."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.checkpoint.contents import Snapshot, take_snapshot
from pipeline.checkpoint.manifest import newest, read_manifest
from pipeline.checkpoint.restore import restore
from pipeline.checkpoint.save import Saver
from pipeline.checkpoint.trainable import TRAINABLE
from pipeline.config import RunConfig
from pipeline.create_run import create_run
from pipeline.load import checked_system, resolve
from pipeline.meter import Meter
from pipeline.parallel.collectives import all_gather_object
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import full_shape
from pipeline.precision import precision_of
from pipeline.train import Trainer


@dataclass
class _Timer:
    seconds: float = 0.0


class Saves:
    """A run that can be stepped, saved and restored by hand. Seconds are those of the slowest rank."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        resolved = resolve(checked_system(config, topology), topology)
        self.run = create_run(resolved, topology)
        self.trainer = Trainer(self.run)
        self.meter = Meter(self.run)
        self.saver: Saver = self.trainer.saver
        self._plain: torch.Tensor | None = None

    def __enter__(self) -> Saves:
        return self

    def __exit__(self, *_: object) -> None:
        self.saver.close()

    @contextmanager
    def _timed(self) -> Iterator[_Timer]:
        timer = _Timer()
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        if self.run.topology.world > 1:
            dist.barrier(group=self.run.topology.control)
        begun = time.perf_counter()
        yield timer
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        timer.seconds = max(all_gather_object(self.run.topology, time.perf_counter() - begun))

    def step(self) -> float:
        """One step of training."""
        with self._timed() as timer:
            step = self.run.progress.step + 1
            self.meter.record(step, self.trainer.step(step, self.meter))
            self.run.progress.step = step
        return timer.seconds

    def _snapshot(self) -> Snapshot:
        return take_snapshot(self.run, self.trainer.carries)

    def save(self) -> float:
        """A synchronous save, from its start to the replaced `latest`."""
        with self._timed() as timer:
            self.saver.save(self._snapshot())
        return timer.seconds

    def begin(self) -> float:
        """Starts an asynchronous save; returns how long training waits for the copy."""
        with self._timed() as timer:
            self.saver.save(self._snapshot(), background=True)
        return timer.seconds

    def poll(self) -> tuple[float, bool]:
        """What the loop asks after every step: how long it waits, and whether the save is committed."""
        with self._timed() as timer:
            done = self.saver.poll()
        return timer.seconds, bool(done)

    def finish(self) -> float:
        """Waits for the save that is under way."""
        with self._timed() as timer:
            self.saver.finish()
        return timer.seconds

    @property
    def newest(self) -> Path:
        found = newest(self.run.folder / "checkpoints")
        assert found is not None
        return found

    def load(self) -> float:
        """Goes back to the newest checkpoint, read from the disk where the system can drop its page cache."""
        path = self.newest
        if self.run.is_main:
            for file in path.rglob("*"):
                if file.is_file():
                    forget(file)
        with self._timed() as timer:
            self.trainer.carries = restore(self.run, path) or [{} for _ in self.run.streams]
        return timer.seconds

    def plain(self) -> tuple[float, float]:
        """Every rank writes as many bytes as a checkpoint has per rank with torch.save, syncs them, and loads them."""
        if self._plain is None:
            elements = self.bytes_by_kind()["total"] // self.run.topology.world // 4
            self._plain = torch.rand(elements)
        path, content = self.run.folder / f"plain-{self.run.topology.rank:05d}.pt", {"x": self._plain}
        with self._timed() as saving:
            with path.open("wb") as handle:
                torch.save(content, handle)
                handle.flush()
                os.fsync(handle.fileno())
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        forget(path)
        with self._timed() as loading:
            torch.load(path, weights_only=True)
        path.unlink()
        return saving.seconds, loading.seconds

    def parameters(self) -> dict[str, int]:
        """How many are trained, and how many in all."""
        sizes = {name: full_shape(p).numel() for name, p in self.run.engine.module.named_parameters()}
        trained = sum(sizes[name] for group in self.run.phase.groups for name in group.parameters)
        return {"trained": trained, "all": sum(sizes.values())}

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of the newest checkpoint, and of the frozen weights that are not in it."""
        manifest = read_manifest(self.newest)
        assert manifest is not None
        found = dict.fromkeys(("shards", "trainable", "carry", "other"), 0)
        for name, entry in manifest["files"].items():
            kind = "shards" if name.endswith("_states.pt") else "carry" if name.startswith("carry-") else "other"
            found["trainable" if name == TRAINABLE else kind] += entry["size"]
        counts = self.parameters()
        element = precision_of(self.run.config).itemsize
        return {**found, "total": sum(found.values()), "frozen": element * (counts["all"] - counts["trained"])}


def forget(path: Path) -> None:
    """Drops a synced file from the page cache, where the system can: a resume after a crash finds it on the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
