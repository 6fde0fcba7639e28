"""What a checkpoint of a run holds: the parts that every rank writes, and what the manifest says of them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.carry import carry_content, write_carry
from pipeline.checkpoint.files import Entry, checksum, tensor_bytes, write_shard, write_tensors
from pipeline.checkpoint.loader_state import LOADER_STATE
from pipeline.checkpoint.restore import TRAINER_STATE
from pipeline.checkpoint.rng import rng_state
from pipeline.checkpoint.trainable import AVERAGE, TRAINABLE, trainable_content
from pipeline.config import RunConfig
from pipeline.config_file import save_config
from pipeline.run import Progress, Run
from pipeline.system import Carry


@dataclass(frozen=True)
class Snapshot:
    """A completed step: what a checkpoint of it holds besides what the engine does."""

    progress: Progress
    cursors: dict[str, Any]
    """The loader's `state_dict`, with this rank's streams where it has any."""
    rng: dict[str, Any]
    carries: Sequence[Carry]


def take_snapshot(run: Run, carries: Sequence[Carry]) -> Snapshot:
    """Where the data and the generators are after a completed step, for a checkpoint of it at any later moment."""
    return Snapshot(dataclasses.replace(run.progress), run.loader.state_dict(), rng_state(), carries)


@dataclass(frozen=True)
class Part:
    """One file of this rank: what is in it, and how it is written."""

    name: str
    content: Any
    write: Callable[[Any, Path], Entry]
    """Of `content`, to a path."""
    copied: bool = False
    """Whether the content is in host memory that training does not change."""

    @property
    def bytes(self) -> int:
        return tensor_bytes(self.content)


def rank_parts(run: Run, snapshot: Snapshot, folder: Path, tag: str) -> list[Part]:
    """What this rank writes, under folder/tag. Collective.

    Tensors are those that training goes on to change, but of parts that say they are copied.
    """
    rank = f"{run.topology.rank:05d}"
    carried, layout = carry_content(snapshot.carries, run.streams, run.topology)
    trainable, copied = trainable_content(run.engine.module, run.trained, run.topology)
    average = run.engine.average
    averaged = [] if average is None else [Part(AVERAGE, average.content(run.topology), average.write, copied=True)]
    return [
        *([Part(TRAINABLE, trainable, write_tensors, copied), *averaged] if run.is_main else []),
        Part(f"carry-{rank}.safetensors", carried, functools.partial(write_carry, layout=layout)),
        Part(f"rng-{rank}.pt", snapshot.rng, write_shard),
        *(Part(path.name, content, write_shard) for path, content in run.engine.collect(folder, tag).items()),
    ]


def shared_parts(run: Run, snapshot: Snapshot, cursors: Sequence[dict[str, Any]]) -> list[Part]:
    """What rank 0 writes for all ranks, whose data cursors are given."""
    config = run.config
    plain = {TRAINER_STATE: dataclasses.asdict(snapshot.progress), LOADER_STATE: _merged(cursors)}
    return [
        *(Part(name, content, _write_json) for name, content in plain.items()),
        Part("config.yaml", config, _write_config),
    ]


def manifest_facts(run: Run, snapshot: Snapshot, packages: dict[str, str | None]) -> dict[str, Any]:
    """What the manifest says of a checkpoint besides its files. `packages` are versions by name."""
    return {
        "step": snapshot.progress.step,
        "recipe": run.config.recipe,
        "system": run.config.model.system,
        "world": run.topology.world,
        "data": run.topology.data,
        "sequence": run.topology.sequence,
        "zero_stage": run.engine.stage,
        **run.engine.layout,
        "global_batch": run.config.batch_size * run.config.grad_accum * run.topology.data,
        "frozen": run.frozen,
        "versions": packages,
        "data_fingerprint": snapshot.cursors.get("fingerprint"),
    }


def _merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The loaders' states of all ranks as one: each has the cursors of its own streams, or all are at one place."""
    if "streams" not in states[0]:
        # The sidecars of another node may name the tokenizer otherwise.
        places = [{key: value for key, value in state.items() if key != "tokenizers"} for state in states]
        assert all(place == places[0] for place in places), "a loader without streams is at one place on every rank"
        return states[0]
    streams = {key: value for state in states for key, value in state["streams"].items()}
    return {**states[0], "streams": streams}


def _write_json(content: Any, path: Path) -> Entry:
    with path.open("w") as handle:
        json.dump(content, handle, indent=1)
        handle.write("\n")
    return checksum(path)


def _write_config(config: RunConfig, path: Path) -> Entry:
    save_config(config, path)
    return checksum(path)
