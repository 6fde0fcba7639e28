"""Putting a run back where a checkpoint was saved, after every byte of it was verified."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.checkpoint.carry import load_carry
from pipeline.checkpoint.loader_state import LOADER_STATE
from pipeline.checkpoint.manifest import RESTORE, manifest_with, problems, read_manifest, unlisted
from pipeline.checkpoint.rng import seed_all, set_rng_state
from pipeline.checkpoint.safe import load_pickle
from pipeline.checkpoint.trainable import AVERAGE
from pipeline.checkpoint.universal import convert, is_universal, load_universal
from pipeline.errors import RankError, UserError
from pipeline.files.json_file import read_json
from pipeline.parallel.collectives import shared_errors
from pipeline.parallel.topology import Topology
from pipeline.run import Progress, Run
from pipeline.system import Carry

TRAINER_STATE = "trainer_state.json"
KINDS: dict[type, Any] = {str: str, bool: bool, int: int, float: (int, float), tuple: list}
"""What JSON makes of the types of `Progress`."""


def restore(run: Run, checkpoint: Path) -> list[Carry]:
    """Puts a run back where `checkpoint` was saved; returns the carry per micro-batch. Collective.

    The checkpoint is one of the run's phase, or one that ended the phase before it; then the progress still says so.
    One of another phase, other ranks, or another ZeRO stage, precision or offload, goes through DeepSpeed's universal
    format, which has every parameter by its name.
    Raises UserError on every rank, before anything is changed, when a byte of the checkpoint, the data or a frozen
    weight differs.
    """
    verify_together(checkpoint, run.topology)
    manifest = manifest_with(checkpoint, "step", "world", "zero_stage", "frozen")
    if manifest["frozen"] != run.frozen:
        raise UserError(
            f"{checkpoint} was trained on other frozen weights than this run has: give the pretrained weights it was"
            " trained on, or take what it trained alone with --init-from"
        )
    progress = read_progress(checkpoint)
    switches = progress.phase != run.phase.name and run.several
    goes_on = not switches or run.phase.keep_carry
    # What was converted from another trainer's checkpoint has no position in this data: it is read from its start.
    if goes_on and LOADER_STATE in manifest["files"]:
        cursors = read_json(checkpoint / LOADER_STATE, RESTORE)
        with shared_errors(run.topology):
            run.loader.load_state_dict(cursors)
    layout = {"world": run.topology.world, "zero_stage": run.engine.stage, **run.engine.layout}
    same = not switches and not is_universal(checkpoint)
    if same and all(manifest.get(key) == value for key, value in layout.items()):
        with _known_here(run.topology):
            run.engine.load(checkpoint)
    else:
        _load_elsewhere(run, checkpoint, switches)
    _restore_average(run, checkpoint, AVERAGE in manifest["files"], switches)
    if manifest["world"] == run.topology.world:
        with _known_here(run.topology):
            set_rng_state(load_pickle(checkpoint / f"rng-{run.topology.rank:05d}.pt"))
    else:
        # Ranks have no successor among more or fewer of them; nothing that is trained may depend on their states.
        seed_all(run.config.seed, f"step {manifest['step']}, rank {run.topology.rank} of {run.topology.world}")
    run.progress = progress
    run.last_checkpoint = checkpoint.name
    return load_carry(checkpoint, run.streams, run.topology, run.device) if goes_on else []


def read_progress(checkpoint: Path) -> Progress:
    """Where a run stood when it saved a checkpoint. Raises UserError when a byte of the file differs."""
    wrong = problems(checkpoint, hashes=True, only=(TRAINER_STATE,))
    if wrong:
        raise UserError(f"{wrong[0]}: {RESTORE}")
    path = checkpoint / TRAINER_STATE
    content, known = read_json(path, RESTORE), vars(Progress())
    # A checkpoint of before a field existed did without.
    if not isinstance(content, dict) or not all(
        name in known and isinstance(value, KINDS[type(known[name])]) for name, value in content.items()
    ):
        raise UserError(f"{path}: not the progress of a run of this version: {RESTORE}")
    return Progress(**content)


@contextlib.contextmanager
def _known_here(topology: Topology) -> Iterator[None]:
    """Between collectives, an error in a file that this rank alone reads is printed by this rank."""
    try:
        yield
    except UserError as error:
        raise RankError(f"rank {topology.rank}: {error}") from error


def _restore_average(run: Run, checkpoint: Path, has_one: bool, switches: bool) -> None:
    """The moving average of a checkpoint; where it has none, or is of another phase, one that begins with its weights.
    The log says so where a run would not expect it. Collective; raises UserError."""
    average = run.engine.average
    if average is not None and has_one and not switches:
        average.load(checkpoint, run.topology)
        return
    if average is not None:
        average.restart()
    if average is not None and not has_one:
        run.chosen["average"] = f"of the weights begins here: {checkpoint} has none"
    elif average is None and has_one:
        run.chosen["average"] = f"of the weights in {checkpoint} ends here: --optimizer.ema-decay is 0"


def _load_elsewhere(run: Run, checkpoint: Path, switches: bool) -> None:
    """Fills the engine from a checkpoint of another layout or phase, through a universal one that is removed again."""
    phases = run.phases if switches else None
    fresh, dropped = (phases.fresh, phases.dropped) if phases is not None else ((), ())
    if is_universal(checkpoint):
        load_universal(run.engine, checkpoint, run.topology, fresh=fresh, dropped=dropped)
        return
    temporary = run.folder / "checkpoints" / f".{checkpoint.name}.universal"
    with shared_errors(run.topology):
        if run.is_main:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            convert(checkpoint, temporary)
    try:
        load_universal(run.engine, temporary, run.topology, fresh=fresh, dropped=dropped)
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
