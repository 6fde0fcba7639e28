"""What the next start reads in the run.json of an earlier one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.files.json_file import parse_json

NAME = "run.json"
KINDS = ("evaluated", "ablated", "sampled")
"""What a run does at some of its steps, and lists."""


@dataclass(frozen=True)
class RunFile:
    """How a run ended, the steps at which it was evaluated, ablated and sampled, the phases it is made of, its last
    checkpoint; None, and no entry, where the file does not say."""

    status: str | None = None
    done: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    phases: tuple[str, ...] | None = None
    last_checkpoint: str | None = None

    @property
    def evaluated(self) -> tuple[int, ...] | None:
        return self.done.get("evaluated")


def read_run_file(folder: Path) -> RunFile:
    """What is known of the run in a folder. A file that is absent or damaged says nothing."""
    try:
        content = parse_json((folder / NAME).read_bytes())
    except (OSError, ValueError):
        return RunFile()
    if not isinstance(content, dict):
        return RunFile()
    status, phases, last = content.get("status"), content.get("phases"), content.get("last_checkpoint")
    lists = {kind: content.get(kind) for kind in KINDS}
    return RunFile(
        status if isinstance(status, str) else None,
        {
            kind: tuple(steps)
            for kind, steps in lists.items()
            if isinstance(steps, list) and all(type(step) is int for step in steps)
        },
        tuple(phases) if isinstance(phases, list) and all(isinstance(name, str) for name in phases) else None,
        last if isinstance(last, str) else None,
    )
