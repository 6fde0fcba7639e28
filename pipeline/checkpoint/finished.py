"""A start of a run that has nothing left to do."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.restore import read_progress
from pipeline.config import RunConfig
from pipeline.config_file import to_plain
from pipeline.files.run_file import RunFile, read_run_file
from pipeline.parallel.collectives import broadcast_object, shared_errors
from pipeline.parallel.topology import Topology


def is_finished(config: RunConfig, checkpoint: Path | None, topology: Topology) -> bool:
    """Whether nothing is left of a run; rank 0 decides and prints it. Collective."""
    with shared_errors(topology):
        message = None if topology.rank else nothing_left(config, checkpoint)
    message = broadcast_object(topology, message)
    if message is not None and topology.rank == 0:
        print(message, flush=True)
    return message is not None


def nothing_left(config: RunConfig, checkpoint: Path | None) -> str | None:
    """The message for a start of a run that ended where this start would end; None when something is left.

    A run that ended on its way has an evaluation or its exit message left. Reads the run directory and changes nothing.
    """
    folder = config.output_dir
    if config.dry_run or checkpoint is None or checkpoint.resolve().parent != (folder / "checkpoints").resolve():
        return None
    manifest = read_manifest(checkpoint)
    step = 0 if manifest is None else int(manifest["step"])
    last = min(config.steps, config.stop_after or config.steps)
    before = read_run_file(folder)
    if before.phases is not None and len(before.phases) > 1:
        return _nothing_left_of_phases(config, checkpoint, before)
    if step < last or before.status not in ("finished", "stopped"):
        return None
    # A file of an older version has no list: its runs ended so after their last evaluation.
    if before.evaluated is not None and step not in before.evaluated:
        return None
    if step >= config.steps:
        how = f"already finished at step {step} (--steps is {config.steps})"
        more = "give a larger --steps"
    else:
        how = f"already stopped at step {step} (--stop-after is {config.stop_after})"
        more = "leave --stop-after out, or give a larger one"
    return _message(folder, how, more)


def _nothing_left_of_phases(config: RunConfig, checkpoint: Path, before: RunFile) -> str | None:
    """As `nothing_left`, of a run of several phases. It ended at its last phase's end, or at `--stop-after`."""
    import yaml

    progress = read_progress(checkpoint)
    if before.evaluated is None or progress.step not in before.evaluated:
        return None
    if config.stop_after is not None and progress.step >= config.stop_after:
        if before.status not in ("finished", "stopped"):
            return None
        how = f"already stopped at step {progress.step} (--stop-after is {config.stop_after})"
        return _message(config.output_dir, how, "leave --stop-after out, or give a larger one")
    # What other flags make of the phases only the system knows.
    saved, now = yaml.safe_load((checkpoint / "config.yaml").read_text()), to_plain(config)
    if before.status != "finished" or any(saved.get(key) != now[key] for key in ("steps", "phases", "phase")):
        return None
    how = f"already finished at step {progress.step}, the end of phase {progress.phase}"
    return _message(config.output_dir, how, "give a larger --steps, or more --phases")


def _message(folder: Path, how: str, more: str) -> str:
    return "\n".join(
        [
            f"{folder}: {how}; nothing was started or changed",
            f"  to train longer    {more}",
            "  to train anew      name another --output-dir, and another --seed for another run",
            f"  to evaluate it     mnemos eval {folder}",
        ]
    )
