"""Started by test_kill.py on every rank: uninterrupted runs, and the last resumes of the ones that were killed.

Usage: kill_main OUT STAGE:LAST ...    trains OUT/straightSTAGE from its start and OUT/killedSTAGE from its checkpoint
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.cli import without_local_rank
from pipeline.commands.flags import parse_run
from pipeline.config import RunConfig
from pipeline.job import train
from pipeline.runtime.exit import exit_process
from pipeline.runtime.ranks import stop

RECIPE = [
    "miras_tiny", "--sequence-length", "128", "--batch-size", "1", "--grad-accum", "2", "--evaluation.steps", "1",
    "--eval-every", "0", "--save-every", "1", "--report.no-plots", "--model.backbone.layers", "2",
    "--model.memory.layers", "1",
]  # fmt: skip
RANKS = 2


def words(stage: int, last: int, folder: Path, *more: str) -> list[str]:
    """What follows `train`: the run that is killed, and the one that is not."""
    return [*RECIPE, "--zero", f"zero{stage}", "--steps", str(last), "--output-dir", str(folder), *more]


def config(*of: str) -> RunConfig:
    return parse_run(of, "train", ranks=RANKS)


def main() -> None:
    folder, *pairs = without_local_rank(sys.argv[1:])
    for stage, last in (map(int, pair.split(":")) for pair in pairs):
        train(config(*words(stage, last, Path(folder) / f"straight{stage}")))
        train(config(*words(stage, last, Path(folder) / f"killed{stage}", "--resume", "must")))
    stop()
    exit_process(0)


if __name__ == "__main__":
    main()
