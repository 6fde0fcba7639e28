"""The step `training step`: the first step of a recipe in bfloat16 beside float32, from the same weights and batch.

Each runs in a process of its own, through the engine that trains. bfloat16 keeps 8 bits: a loss that is a mean over
thousands of tokens agrees far better than its summands, a gradient's norm to about a percent.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.bench.throughput import MARK
from pipeline.errors import UserError

LOSS_BOUND, NORM_BOUND = 5e-3, 3e-2
"""Relative differences that pass."""


def compare(words: Sequence[str]) -> dict[str, Any]:
    """Loss and gradient norm in both precisions. Raises UserError where a run fails, or they differ too much."""
    found: dict[str, Any] = {precision: _first_step(words, precision) for precision in ("fp32", "bf16")}
    for name, bound in (("loss", LOSS_BOUND), ("grad_norm", NORM_BOUND)):
        fp32, bf16 = (found[precision][name] for precision in ("fp32", "bf16"))
        found[f"{name}_difference"] = abs(bf16 - fp32) / abs(fp32)
        found[f"{name}_bound"] = bound
    return found


def failure(found: dict[str, Any]) -> str | None:
    """What differs too much."""
    for name in ("loss", "grad_norm"):
        # A NaN is no agreement.
        if not found[f"{name}_difference"] <= found[f"{name}_bound"]:
            return f"{name} differs by {found[f'{name}_difference']:.1e}, more than {found[f'{name}_bound']:.0e}"
    return None


def _first_step(words: Sequence[str], precision: str) -> dict[str, float | None]:
    command = [sys.executable, "-m", "pipeline", "bench", "throughput-case", *words]
    command += ["--steps", "1", "--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if line is None:
        print(done.stdout, done.stderr, sep="\n")
        tail = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        raise UserError(f"the step in {precision} failed: {tail[-1]}")
    first: dict[str, float | None] = json.loads(line.removeprefix(MARK))["first_step"]
    if first["grad_norm"] is None:
        raise UserError(f"the step in {precision} has a gradient that is not finite")
    return first


if __name__ == "__main__":
    try:
        result = compare(sys.argv[2:])
    except UserError as error:
        raise SystemExit(str(error)) from None
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    wrong = failure(result)
    if wrong:
        raise SystemExit(wrong)
