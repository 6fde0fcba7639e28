"""The step `recall`: trains `miras_recall` on the device and reads what it recalls, memory on and off."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def recall(folder: Path, flags: Sequence[str]) -> dict[str, Any]:
    """The last evaluation of a run, and its time per step. Raises SystemExit where the run fails."""
    command = [sys.executable, "-m", "pipeline", "train", "miras_recall", *flags, "--output-dir", str(folder / "run")]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(f"the run ended with exit status {code}; its own line is above")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluation = [row for row in rows if row["mode"] == "val"][-1]
    steps = [row for row in rows if row["mode"] == "train"]
    return {
        "steps": evaluation["step"],
        "seconds": steps[-1]["elapsed"],
        "tok_s": steps[-1]["tok_s"],
        "val": evaluation,
    }


if __name__ == "__main__":
    found = recall(Path(sys.argv[2]), sys.argv[3:])
    Path(sys.argv[1]).write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
