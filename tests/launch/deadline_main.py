"""Started by test_stop.py on every rank: `train`, whose --max-hours have passed on the last rank once steps are done.

Usage: deadline_main FOLDER STEP WORDS. When the newest logged step of the run in FOLDER is STEP, that rank's clock says
that it began before all time: how long steps take is the machine's affair.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pipeline.cli
from pipeline.cli import without_local_rank
from pipeline.runtime.stop import StopRequests
from tests.launch.test_stop import steps


def main() -> int:
    folder, step, *words = without_local_rank(sys.argv[1:])
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

    class Clock(StopRequests):
        @property
        def pending(self) -> int:
            if last and steps(Path(folder))[-1:] >= [int(step)]:
                self._begun = -math.inf
            return super().pending

    pipeline.cli.StopRequests = Clock  # type: ignore[misc]
    return pipeline.cli.main(words)


if __name__ == "__main__":
    sys.exit(main())
