"""A start of a run that has nothing left to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoint.compatibility import read_config
from pipeline.checkpoint.restore import read_progress
from pipeline.config import RunConfig
from pipeline.config_file import to_plain
from pipeline.files.run_file import read_run_file
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
    """The message for a start of a run that ended where this start would end; None when something may be left.

    A run that ended on its way has an evaluation or its exit message left, and one that goes back to before its end has
    the steps from there. Reads the run directory and changes nothing. How long the phases are only the system knows:
    with other flags than those that the run ended by, it is asked.
    """
    folder = config.output_dir
    if config.dry_run or checkpoint is None or checkpoint.resolve().parent != (folder / "checkpoints").resolve():
        return None
    progress, before = read_progress(checkpoint), read_run_file(folder)
    step = progress.step
    # A file of an older version has no list: its runs ended so after their last evaluation.
    if before.status not in ("finished", "stopped") or (before.evaluated is not None and step not in before.evaluated):
        return None
    goes_back = before.last_checkpoint not in (None, checkpoint.name)
    impatient = 0 < config.evaluation.patience <= progress.not_better
    if before.status == "finished" and not goes_back and (impatient or not _longer(config, checkpoint)):
        if impatient:
            given = f"--evaluation.patience is {config.evaluation.patience}"
            how = f"at step {step}: {progress.not_better} evaluations in a row were no better ({given})"
            more = "give a larger --evaluation.patience, or 0"
        elif before.phases is not None and len(before.phases) > 1:
            how, more = f"at step {step}, the end of phase {progress.phase}", "give a larger --steps, or more --phases"
        else:
            epochs = config.epochs.train
            flag, value = ("--epochs", f"{epochs:g}") if epochs else ("--steps", config.steps)
            how, more = f"at step {step} ({flag} is {value})", f"give a larger {flag}"
        return _message(folder, f"already finished {how}", more)
    if config.stop_after is not None and step >= config.stop_after:
        how = f"already stopped at step {step} (--stop-after is {config.stop_after})"
        return _message(folder, how, "leave --stop-after out, or give a larger one")
    return None


def _longer(config: RunConfig, checkpoint: Path) -> bool:
    """Whether the phases of a run may be longer, or others, than those of the run that saved a checkpoint."""
    saved, now = read_config(checkpoint), to_plain(config)
    if saved["steps"] < now["steps"]:
        return True
    ends = {key: value for key, value in saved.get("evaluation", {}).items() if key in ("best", "patience")}
    if _differs(ends, now["evaluation"]):
        return True
    return any(key in saved and _differs(saved[key], now[key]) for key in ("phases", "phase", "model", "epochs"))


def _differs(saved: Any, now: Any) -> bool:
    """Whether a value is another than the saved one; fields that an older version did not save are left out."""
    if isinstance(saved, dict) and isinstance(now, dict):
        return any(key in now and _differs(value, now[key]) for key, value in saved.items())
    return bool(saved != now)


def _message(folder: Path, how: str, more: str) -> str:
    return "\n".join(
        [
            f"{folder}: {how}; nothing was started or changed",
            f"  to train longer    {more}",
            "  to train anew      name another --output-dir, and another --seed for another run",
            f"  to evaluate it     mnemos eval {folder}",
        ]
    )
