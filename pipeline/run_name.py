"""`--run-name`, `--run-id` and `--output-root`: names from which the run directory follows."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Collection
from pathlib import Path

from pipeline.config import AUTO_ID, RunConfig
from pipeline.errors import UserError

OUTPUTS = Path("outputs")
"""Where named runs are, below the current folder."""
FORM = "%Y%m%d_%H%M%S"
"""What `--run-id auto` makes of a time."""


def with_named_folder(config: RunConfig, flags: Collection[str], stated: Collection[str] = ()) -> RunConfig:
    """The config with the `output_dir` that its names mean, which are then gone; `--run-id auto` waits for the start.

    `flags`: the names of the fields among output_dir, output_root, run_name and run_id that have flags; `stated`: those
    that a --config file has. A flag stands over the file. Raises UserError where two of them name the folder.
    """
    names = [name for name in ("run_name", "run_id", "output_root") if getattr(config, name) is not None]
    if not names:
        return config
    if "output_dir" in flags:
        typed = next((name for name in names if name in flags), None)
        if typed is not None:
            raise UserError(f"--output-dir and --{typed.replace('_', '-')} are both given: keep one")
        return dataclasses.replace(config, run_name=None, run_id=None, output_root=None)
    if "output_dir" in stated and config.run_name is None and config.run_id is not None:
        raise UserError(f"--run-id {config.run_id}: --config names a folder of its own: give --run-name too")
    if "output_dir" in stated and "run_name" not in flags:
        raise UserError("--config gives output_dir and run_name: keep one")
    own = config.output_dir if config.output_root is None else Path(config.output_dir.name)
    folder = (config.output_root or (Path() if config.run_name is None else OUTPUTS)) / (config.run_name or own)
    later = config.run_id if config.run_id == AUTO_ID else None
    if config.run_id is not None and later is None:
        folder /= config.run_id
    return dataclasses.replace(config, output_dir=folder, run_name=None, run_id=later, output_root=None)


def new_folder(config: RunConfig) -> Path:
    """The run directory of a start: below `output_dir`, by this moment, for `--run-id auto`; else `output_dir` itself.

    One process of a job decides for all: clocks differ. A folder that is there belongs to another start.
    """
    if config.run_id != AUTO_ID:
        return config.output_dir
    now = datetime.datetime.now().replace(microsecond=0)
    while (folder := config.output_dir / now.strftime(FORM)).exists():
        now += datetime.timedelta(seconds=1)
    return folder


def in_folder(config: RunConfig, folder: Path) -> RunConfig:
    """The config of a start whose folder is decided."""
    return dataclasses.replace(config, output_dir=folder, run_id=None)
