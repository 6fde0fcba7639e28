"""The command `doctor`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.commands.doctor.report import Report, collect
from pipeline.commands.doctor.table import render
from pipeline.commands.flags import pop_flag
from pipeline.errors import UserError


def run_doctor(words: Sequence[str]) -> Report:
    """The command: `doctor [--json FILE]`; returns what it shows."""
    file, rest = pop_flag(list(words), "--json")
    if rest:
        raise UserError(f"doctor takes --json FILE alone, got {rest[0]!r}")
    report = collect()
    if file is not None:
        try:
            Path(file).write_text(json.dumps(report, indent=2, default=str) + "\n")
        except OSError as error:
            raise UserError(f"--json {file}: {error.strerror}: name a file that can be written") from None
    print(render(report))
    return report
