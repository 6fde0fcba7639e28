"""Finding the checkpoint to go on from."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoint.manifest import named_checkpoints, newest, pointed, problems, recover
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.parallel.collectives import broadcast_object, shared_errors
from pipeline.parallel.topology import Topology


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
    path = pointed(Path(config.resume))
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
