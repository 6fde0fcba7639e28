"""What the next start reads in the run.json of an earlier one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.files.json_file import parse_json

NAME = "run.json"


@dataclass(frozen=True)
class RunFile:
    """How a run ended, the steps that it evaluated, the phases it is made of; None where the file does not say."""

    status: str | None = None
    evaluated: tuple[int, ...] | None = None
    phases: tuple[str, ...] | None = None


def read_run_file(folder: Path) -> RunFile:
    """What is known of the run in a folder. A file that is absent or damaged says nothing."""
    try:
        content = parse_json((folder / NAME).read_bytes())
    except (OSError, ValueError):
        return RunFile()
    if not isinstance(content, dict):
        return RunFile()
    status, evaluated, phases = (content.get(key) for key in ("status", "evaluated", "phases"))
    return RunFile(
        status if isinstance(status, str) else None,
        tuple(evaluated) if isinstance(evaluated, list) and all(type(step) is int for step in evaluated) else None,
        tuple(phases) if isinstance(phases, list) and all(isinstance(name, str) for name in phases) else None,
    )
