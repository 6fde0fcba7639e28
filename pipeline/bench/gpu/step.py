"""A step of `make gpu`: one process, what it needs, how long it may take, and when it has passed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

STAGE_SECONDS = 530.0
"""A stage ends within nine minutes: a step starts only where some of this is left, and gets no more than that."""

PYTHON, RESULT, SCRATCH = "{python}", "{result}", "{scratch}"
"""Stand in a command for this Python, the file that a step writes its figures to, and a folder that is removed."""

Figures = Mapping[str, Any]
Check = Callable[[Figures], str | None]


@dataclass(frozen=True)
class Step:
    """One process."""

    name: str
    shows: str
    """What a reader of docs/results.md learns from it."""
    command: tuple[str, ...]
    limit: float
    """Seconds."""
    needs: tuple[str, ...] = ()
    """Modules that it imports."""
    tools: tuple[str, ...] = ()
    """Commands that it runs."""
    writes: Literal["json", "junit", "nothing"] = "nothing"
    """What is in the file RESULT."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    check: Check | None = None
    """From the figures of a step whose process ended well: why it has not passed, or None. Without one it has."""
    measures: bool = False
    """Whether it measures what the device can do, so that running out of memory is a result, not a failure."""
    peer: bool = False
    """Whether it runs another package, whose failure does not fail `make gpu`."""
    always: bool = False
    """Whether it runs again although it has passed: what it leaves behind may be gone."""
