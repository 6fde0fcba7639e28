"""Finding the checkpoint to go on from, and going on from it."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.checkpoint.carry import load_carry
from pipeline.checkpoint.manifest import MANIFEST, named_checkpoints, newest, problems, read_manifest, recover, unlisted
from pipeline.checkpoint.safe import load_pickle
from pipeline.checkpoint.universal import convert, is_universal, load_universal
from pipeline.config import MAY_CHANGE, RunConfig
from pipeline.config_file import to_plain
from pipeline.data.batch import StatefulLoader
from pipeline.errors import RankError, UserError, brief, shown
from pipeline.files.json_file import read_json
from pipeline.host.hardware import on_gpu
from pipeline.parallel.collectives import broadcast_object, shared_errors
from pipeline.parallel.topology import Topology
from pipeline.parallel.weight_files import file_tensors, open_safetensors
from pipeline.parallel.weights import generator_for, load_safetensors
from pipeline.run import Progress, Run
from pipeline.system import Carry

TRAINABLE = "trainable.safetensors"
TRAINER_STATE = "trainer_state.json"
RESTORE = "restore the file, or resume from another checkpoint with --resume PATH"


def find_checkpoint(config: RunConfig, topology: Topology) -> Path | None:
    """The checkpoint that `--resume` means, decided by rank 0; None for a fresh start. UserError on every rank."""
    with shared_errors(topology):
        checkpoint = locate_checkpoint(config) if topology.rank == 0 else None
    return broadcast_object(topology, checkpoint)


def locate_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that `--resume` means on this machine; None for a fresh start. Raises UserError."""
    folder = config.output_dir / "checkpoints"
    if not config.dry_run:
        # A trial has no lock: what lies aside may be that of a save under way.
        recover(folder)
    if config.resume == "never":
        # A damaged one counts: its files may come back.
        if named_checkpoints(folder):
            raise UserError(f"{config.output_dir} holds a run: name another --output-dir, or --resume auto to go on")
        return None
    if config.resume in ("auto", "must"):
        found = newest(folder)
        if found is None and config.resume == "must":
            raise UserError(f"--resume must: no complete checkpoint in {folder}")
        return found
    path = Path(config.resume)
    if (path / "checkpoints").is_dir():
        path = newest(path / "checkpoints") or path
    if path.resolve().parent != folder.resolve():
        # It says where the run began. What the run has saved since is newer, and the same command goes on from there.
        own = newest(folder)
        if own is not None:
            return own
    wrong = problems(path, hashes=False)
    if wrong:
        raise UserError(f"--resume {wrong[0]}")
    return path


def keep_global_batch(config: RunConfig, topology: Topology, checkpoint: Path) -> RunConfig:
    """The config with as many micro-batches as keep the checkpoint's global batch on this layout. Raises UserError."""
    rows, whole = config.batch_size * topology.data, _manifest_with(checkpoint, "global_batch")["global_batch"]
    if whole % rows:
        raise UserError(
            f"{checkpoint} was trained with {whole} sequences per step, and --batch-size {config.batch_size} on"
            f" {topology.data} data ranks makes steps of {rows}: choose a batch size that divides it"
        )
    return dataclasses.replace(config, grad_accum=whole // rows)


def restore(run: Run, checkpoint: Path, loader: StatefulLoader, streams: Sequence[Sequence[int]]) -> list[Carry]:
    """Puts a run back where `checkpoint` was saved; returns the carry per micro-batch. Collective.

    A checkpoint of other ranks, or another ZeRO stage, precision or offload, goes through DeepSpeed's universal format.
    Raises UserError on every rank, before anything is changed, when a byte of the checkpoint, the data or a frozen
    weight differs.
    """
    assert run.engine is not None
    verify_together(checkpoint, run.topology)
    manifest = _manifest_with(checkpoint, "step", "world", "zero_stage", "frozen")
    if manifest["frozen"] != run.frozen:
        raise UserError(
            f"{checkpoint} was trained on other frozen weights than this run has: give the pretrained weights it was"
            " trained on, or take what it trained alone with --init-from"
        )
    progress = _progress(checkpoint)
    cursors = read_json(checkpoint / "loader.json", RESTORE)
    with shared_errors(run.topology):
        loader.load_state_dict(cursors)
    layout = {"world": run.topology.world, "zero_stage": run.engine.stage, **run.engine.layout}
    if not is_universal(checkpoint) and all(manifest.get(key) == value for key, value in layout.items()):
        with _known_here(run.topology):
            run.engine.load(checkpoint)
    else:
        _load_elsewhere(run, checkpoint)
    if manifest["world"] == run.topology.world:
        with _known_here(run.topology):
            set_rng_state(load_pickle(checkpoint / f"rng-{run.topology.rank:05d}.pt"))
    else:
        # Ranks have no successor among more or fewer of them; nothing that is trained may depend on their states.
        seed_all(run.config.seed, f"step {manifest['step']}, rank {run.topology.rank} of {run.topology.world}")
    run.progress = progress
    run.last_checkpoint = checkpoint.name
    return load_carry(checkpoint, streams, run.topology, run.device)


def _manifest_with(checkpoint: Path, *facts: str) -> dict[str, Any]:
    """The manifest of a checkpoint, which says all of `facts`. Raises UserError."""
    manifest = read_manifest(checkpoint) or {}
    missing = next((fact for fact in facts if fact not in manifest), None)
    if missing is not None:
        raise UserError(
            f"{checkpoint / MANIFEST}: says nothing of {missing!r}: it is of another version of this program; take the"
            " weights alone with --init-from"
        )
    return manifest


def _progress(checkpoint: Path) -> Progress:
    path = checkpoint / TRAINER_STATE
    content = read_json(path, RESTORE)
    try:
        return Progress(**content)
    except TypeError:
        raise UserError(f"{path}: not the progress of a run of this version: {RESTORE}") from None


@contextlib.contextmanager
def _known_here(topology: Topology) -> Iterator[None]:
    """What is wrong with a file that this rank alone reads, between collectives, is for this rank to say."""
    try:
        yield
    except UserError as error:
        raise RankError(f"rank {topology.rank}: {error}") from error


def _load_elsewhere(run: Run, checkpoint: Path) -> None:
    """Fills the engine from a checkpoint of another layout, through a universal one that is removed again."""
    assert run.engine is not None
    if is_universal(checkpoint):
        load_universal(run.engine, checkpoint, run.topology)
        return
    temporary = run.folder / "checkpoints" / f".{checkpoint.name}.universal"
    with shared_errors(run.topology):
        if run.is_main:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            convert(checkpoint, temporary)
    try:
        load_universal(run.engine, temporary, run.topology)
    finally:
        if run.is_main:
            shutil.rmtree(temporary, ignore_errors=True)


def verify_together(checkpoint: Path, topology: Topology) -> None:
    """Every byte against the manifest, each rank a share of the files. Collective; raises UserError."""
    with shared_errors(topology):
        wrong = problems(checkpoint, hashes=True, part=(topology.rank, topology.world))
        if wrong:
            raise UserError(f"{wrong[0]}: {RESTORE}")
        for path in unlisted(checkpoint, read_manifest(checkpoint) or {}):
            if path.match("*_states.pt") or path.match("carry-*.safetensors"):
                raise UserError(f"{checkpoint / path}: not in the manifest, and would be read like the rest: remove it")


def check_resumable(config: RunConfig, checkpoint: Path) -> None:
    """Raises UserError when a run cannot go on from a checkpoint: another system, or another model.

    It reads the manifest and the archived config alone, so it can be asked before anything is built.
    """
    import yaml

    wrong = problems(checkpoint, hashes=True, only=("config.yaml",))
    if wrong:
        raise UserError(f"{wrong[0]}: {RESTORE}")
    system = _manifest_with(checkpoint, "system")["system"]
    if system != config.model.system:
        raise UserError(
            f"{checkpoint} was saved with system {brief(system)}, this run has {config.model.system}: resume with its"
            " recipe"
        )
    saved = yaml.safe_load((checkpoint / "config.yaml").read_text())["model"]
    different = _first_difference(saved, config.model, to_plain(config)["model"], "--model")
    if different is not None:
        flag, before, now = different
        raise UserError(
            f"{checkpoint} was trained with {flag} {before}, this run has {now}: give the same, or take what fits with"
            " --init-from"
        )


def _first_difference(saved: Any, section: Any, plain: Any, flag: str) -> tuple[str, Any, Any] | None:
    """The first field in which a saved section, as plain values, is another model than `section`, whose are `plain`."""
    if not (isinstance(saved, dict) and dataclasses.is_dataclass(section)):
        return None if saved == plain else (flag, saved, plain)
    ignored = getattr(section, "ignored_fields", ())
    for field in dataclasses.fields(section):
        if field.name in ignored or MAY_CHANGE.items() <= field.metadata.items():
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


def has_trainable(checkpoint: Path, topology: Topology) -> bool:
    """Whether rank 0 sees trained weights in a folder. Collective."""
    return broadcast_object(topology, (checkpoint / TRAINABLE).is_file())


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a model's `state_dict`, such as moving averages, by name: the model's own tensors.

    They are whole on every rank at any ZeRO stage.
    """
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in kept}


def load_trainable(model: nn.Module, checkpoint: Path, topology: Topology) -> None:
    """Fills the parameters that a checkpoint trained, and the persistent buffers that it holds. Collective.

    Raises UserError on every rank, before anything is filled, when a tensor is not the model's or is of another shape
    or kind. Buffers that the checkpoint lacks stay as they are: one of an older version holds none.
    """
    path = checkpoint / TRAINABLE
    parameters = {name for name, _ in model.named_parameters()}
    buffers = persistent_buffers(model)
    with shared_errors(topology):
        if not path.is_file():
            raise UserError(f"{checkpoint}: no {TRAINABLE} there: give the folder of a checkpoint")
        if topology.rank == 0 and (checkpoint / MANIFEST).is_file():
            wrong = problems(checkpoint, hashes=True, only=(TRAINABLE,))
            if wrong:
                raise UserError(f"{wrong[0]}: restore the file, or give another checkpoint")
        names = list(file_tensors(path))
        unknown = [name for name in names if name not in parameters and name not in buffers]
        if unknown:
            raise UserError(
                f"{path}: {shown(unknown[0])} is no parameter of this model: is it a checkpoint of another one?"
            )
        values = _read_buffers(path, {name: buffers[name] for name in names if name not in parameters})
    rename = {name: name for name in names if name in parameters}
    load_safetensors(model, lambda: file_tensors(path), rename, topology, what=str(path))
    with torch.no_grad():
        for name, value in values.items():
            buffers[name].copy_(value)


def _read_buffers(path: Path, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file has for these buffers, each of which it has. Raises UserError for another shape or kind."""
    values = {}
    with open_safetensors(path) as handle:
        for name, buffer in buffers.items():
            value = values[name] = handle.get_tensor(name)
            if value.shape != buffer.shape:
                raise UserError(
                    f"{path}: {shown(name)} is {tuple(value.shape)}, the model wants {tuple(buffer.shape)}: another"
                    " model, or other sizes?"
                )
            # The precision may be another one, as it may for parameters; a count is no average.
            both_floating = value.is_floating_point() and buffer.is_floating_point()
            if value.dtype != buffer.dtype and not both_floating:
                raise UserError(
                    f"{path}: {shown(name)} is {value.dtype}, the model wants {buffer.dtype}: is it a checkpoint of"
                    " another one?"
                )
    return values


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


def seed_all(seed: int, name: str) -> None:
    """Seeds this process's global generators by a run's seed and a name."""
    value = generator_for(seed, name).initial_seed()
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
