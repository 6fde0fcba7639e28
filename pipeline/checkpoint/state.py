"""Saving and restoring a run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.archive import save_config, to_plain
from pipeline.checkpoint.carry import load_carry, save_carry
from pipeline.checkpoint.manifest import (
    LATEST,
    commit,
    complete_checkpoints,
    newest,
    problems,
    read_manifest,
    remove_old,
    write_manifest,
)
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.hardware import on_gpu
from pipeline.parallel.agreement import agree, from_main, together
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import full_state, load_safetensors, open_safetensors
from pipeline.run import Progress, Run, versions
from pipeline.system import Carry, StatefulLoader

TRAINABLE = "trainable.safetensors"
TRAINER_STATE = "trainer_state.json"


def find_checkpoint(config: RunConfig, topology: Topology) -> Path | None:
    """The checkpoint that `--resume` means, decided by rank 0; None for a fresh start. UserError on every rank."""
    found: Path | None = None
    problem: str | None = None
    if topology.rank == 0:
        try:
            found = locate_checkpoint(config)
        except UserError as error:
            problem = str(error)
    found, problem = from_main(topology, (found, problem))
    if problem is not None:
        raise UserError(problem)
    return found


def locate_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that `--resume` means on this machine; None for a fresh start. Raises UserError."""
    folder = config.output_dir / "checkpoints"
    if config.resume == "never":
        if complete_checkpoints(folder):
            raise UserError(f"{config.output_dir} holds a run: name another --output-dir, or --resume auto to go on")
        return None
    if config.resume in ("auto", "must"):
        found = newest(folder)
        if found is None and config.resume == "must":
            raise UserError(f"--resume must: no complete checkpoint in {folder}")
        return found
    path = Path(config.resume)
    wrong = problems(path, hashes=False)
    if wrong:
        raise UserError(f"--resume {wrong[0]}")
    return path


def keep_global_batch(config: RunConfig, topology: Topology, checkpoint: Path | None) -> RunConfig:
    """The config with as many micro-batches as keep the checkpoint's global batch on this layout. Raises UserError."""
    manifest = None if checkpoint is None else read_manifest(checkpoint)
    if manifest is None:
        return config
    rows, whole = config.batch_size * topology.data, int(manifest["global_batch"])
    if whole % rows:
        raise UserError(
            f"{checkpoint} was trained with {whole} sequences per step, and --batch-size {config.batch_size} on"
            f" {topology.data} data ranks makes steps of {rows}: choose a batch size that divides it"
        )
    return dataclasses.replace(config, grad_accum=whole // rows)


def save_checkpoint(
    run: Run, loader: StatefulLoader, carries: Sequence[Carry], streams: Sequence[Sequence[int]]
) -> str:
    """Writes checkpoint-STEP and points `latest` at it; returns its name. Collective.

    Everything is written to a hidden folder first; the manifest is written last, then the folder gets its name, then
    `latest` is replaced. A save that fails leaves neither. Raises UserError on every rank when a rank cannot write.
    """
    assert run.engine is not None and run.phase is not None
    checkpoints = run.folder / "checkpoints"
    name = f"checkpoint-{run.progress.step}"
    partial = checkpoints / f".{name}.partial"
    trainable = full_state(run.engine.module, [n for group in run.phase.groups for n in group.parameters])
    cursors = _merged_cursors(loader, run.topology)

    def prepare() -> None:
        if run.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            carried = sum(e.tensor.numel() * e.tensor.element_size() for carry in carries for e in carry.values())
            _check_room(checkpoints, sum(t.numel() for t in trainable.values()), carried * run.topology.world)

    def write_own() -> None:
        if run.is_main:
            save_file(trainable, partial / TRAINABLE)
            _write(partial / TRAINER_STATE, dataclasses.asdict(run.progress))
            _write(partial / "loader.json", cursors)
            save_config(run.config, partial / "config.yaml")
        save_carry(partial, carries, streams, run.topology)
        torch.save(rng_state(), partial / f"rng-{run.topology.rank:05d}.pt")

    def write_shards() -> None:
        assert run.engine is not None
        run.engine.save(checkpoints, partial.name)

    def finish() -> None:
        if run.is_main:
            write_manifest(partial, _facts(run, cursors))
            commit(partial, checkpoints / name, checkpoints / LATEST)
            remove_old(checkpoints, run.config.keep, run.progress.step)

    try:
        # Room and our own files come before DeepSpeed's collectives: a rank that cannot write must not leave the others
        # waiting in them.
        for part in (prepare, write_own, write_shards, finish):
            _together(run, part)
    except UserError:
        if run.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    run.last_checkpoint = name
    return name


def _together(run: Run, part: Callable[[], None]) -> None:
    problem = None
    try:
        part()
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        problem = f"checkpoint-{run.progress.step} was not saved to {run.folder}: {reason}: make room there and resume"
    agree(run.topology, problem)


def _check_room(folder: Path, trainable: int, carried: int) -> None:
    # Weights, their float32 masters and two moments, each 4 bytes, and the weights once more for people.
    needed, free = 20 * trainable + carried, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB needed")


def _facts(run: Run, cursors: dict[str, Any]) -> dict[str, Any]:
    assert run.engine is not None
    return {
        "step": run.progress.step,
        "recipe": run.config.recipe,
        "system": run.config.model.system,
        "world": run.topology.world,
        "data": run.topology.data,
        "sequence": run.topology.sequence,
        "zero_stage": run.engine.stage,
        "global_batch": run.config.batch_size * run.config.grad_accum * run.topology.data,
        "versions": versions(),
        "data_fingerprint": cursors.get("fingerprint"),
    }


def restore(run: Run, checkpoint: Path, loader: StatefulLoader, streams: Sequence[Sequence[int]]) -> list[Carry]:
    """Puts a run back where `checkpoint` was saved; returns the carry per micro-batch. Collective."""
    assert run.engine is not None
    state = json.loads((checkpoint / TRAINER_STATE).read_text())
    run.progress = Progress(**state)
    problem = None
    try:
        loader.load_state_dict(json.loads((checkpoint / "loader.json").read_text()))
    except UserError as error:
        problem = str(error)
    agree(run.topology, problem)
    run.engine.load(checkpoint)
    rng = checkpoint / f"rng-{run.topology.rank:05d}.pt"
    set_rng_state(torch.load(rng, weights_only=True))
    run.last_checkpoint = checkpoint.name
    return load_carry(checkpoint, streams, run.topology, run.device)


def check_resumable(config: RunConfig, ranks: int, zero_stage: int, checkpoint: Path) -> None:
    """Raises UserError when a run cannot go on from a checkpoint: another system, layout of shards or size of model.

    It reads the manifest and the archived config alone, so it can be asked before anything is built.
    """
    import yaml

    saved = yaml.safe_load((checkpoint / "config.yaml").read_text())["model"]
    different = _first_difference(saved, config.model, to_plain(config)["model"], "--model")
    if different is not None:
        flag, before, now = different
        raise UserError(
            f"{checkpoint} was trained with {flag} {before}, this run has {now}: give the same, or take what fits with"
            " --init-from"
        )
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    mine = {"system": config.model.system, "ranks": ranks, "ZeRO stage": zero_stage}
    before = {"system": manifest["system"], "ranks": manifest["world"], "ZeRO stage": manifest["zero_stage"]}
    for what, value in mine.items():
        if before[what] != value:
            raise UserError(
                f"{checkpoint} was saved with {what} {before[what]}, this run has {value}:"
                " start with the same, or take the weights alone with --init-from"
            )


def _first_difference(saved: Any, section: Any, plain: Any, flag: str) -> tuple[str, Any, Any] | None:
    """The first field in which a saved section, as plain values, is another model than `section`, whose are `plain`."""
    if not (isinstance(saved, dict) and dataclasses.is_dataclass(section)):
        return None if saved == plain else (flag, saved, plain)
    # Which backend computes a thing, and in what pieces, leaves the model the same; so does what the section does
    # not use, as it says itself.
    idle = {"backend", "chunk", "lr_scale", *getattr(section, "idle", ())}
    for field in dataclasses.fields(section):
        if field.name in idle:
            continue
        value = getattr(section, field.name)
        # A run of before the field existed did what its default does.
        if field.name not in saved and value == field.default:
            continue
        words = f"{flag}.{field.name.replace('_', '-')}"
        found = _first_difference(saved.get(field.name), value, plain[field.name], words)
        if found is not None:
            return found
    return None


def load_trainable(model: torch.nn.Module, checkpoint: Path, topology: Topology) -> None:
    """Fills the parameters that a checkpoint trained. Collective; raises UserError."""
    path = checkpoint / TRAINABLE
    known = {name for name, _ in model.named_parameters()}

    def read_names() -> list[str]:
        if not path.is_file():
            raise UserError(f"{checkpoint}: no {TRAINABLE} there: give the folder of a checkpoint")
        with open_safetensors(path) as handle:
            names = list(handle.keys())
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(f"{path}: {unknown[0]!r} is no parameter of this model: is it a checkpoint of another one?")
        return names

    names = together(topology, read_names)
    load_safetensors(model, [path], {name: name for name in names}, topology, what=str(path))


def rng_state() -> dict[str, Any]:
    """Random states of this rank, in types that `torch.load(weights_only=True)` accepts."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if on_gpu() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and on_gpu():
        torch.cuda.set_rng_state(state["cuda"])


def _merged_cursors(loader: StatefulLoader, topology: Topology) -> dict[str, Any]:
    mine = loader.state_dict()
    if topology.world == 1:
        return mine
    everyone: list[dict[str, Any]] = [{}] * topology.world
    dist.all_gather_object(everyone, mine)
    return {**mine, "streams": {key: value for state in everyone for key, value in state.get("streams", {}).items()}}


def _write(path: Path, content: Any) -> None:
    with contextlib.closing(path.open("w")) as handle:
        json.dump(content, handle, indent=1)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
