"""`python -m pipeline.bench.gpu [STAGE ...]`, which `make gpu` calls. Reads OUT and WHEELS from the environment."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.bench.gpu.packages import install_missing, versions
from pipeline.bench.gpu.runner import BAD, Facts, finished, run_step
from pipeline.bench.gpu.steps import STAGE_SECONDS, STAGES, steps_of
from pipeline.bench.gpu.table import line, render
from pipeline.bench.gpu.target import device_environment, find_target
from pipeline.errors import UserError
from pipeline.provenance import ROOT, commit, sources_digest

USAGE = f"""usage: make gpu [STAGES="{" ".join(STAGES)}"] [OUT=outputs/gpu] [WHEELS=FOLDER]

Builds, checks, times and trains on this machine's GPU; every step writes a log and a JSON file to OUT.
docs/gpu.md says what each stage does. `python -m pipeline bench report OUT` puts the figures into docs/results.md."""


def main(words: Sequence[str]) -> int:
    """Runs the stages; 0 where no step failed, 1 where one did, 2 for what the user has to change."""
    if {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    try:
        return run(words or STAGES)
    except UserError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2


def run(stages: Sequence[str]) -> int:
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise UserError(f"STAGES has {unknown[0]!r}: give one or more of {', '.join(STAGES)}")
    folder = Path(os.environ.get("OUT") or ROOT / "outputs" / "gpu").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUT is {folder}: {error.strerror}: name a folder that can be written") from None
    environment = dict(os.environ)
    paths = [str(ROOT)]
    if wheels := environment.get("WHEELS"):
        site = ROOT / "build" / "gpu-packages"
        installed = install_missing(Path(wheels).absolute(), site)
        print(f"installed {len(installed)} packages from {wheels}" if installed else f"{wheels}: nothing is missing")
        # After this Python's own packages, which the wheels only add to.
        sys.path.append(str(site))
        paths.append(str(site))
        importlib.invalidate_caches()
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [environment.get("PYTHONPATH")])])
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    target = find_target(environment)
    environment = device_environment(environment, target)
    facts = Facts(target.name, target.driver, versions(), commit(), sources_digest(), target.memory)
    print(f"{target.name}, driver {target.driver}; results go to {folder}", flush=True)
    results = []
    for stage in stages:
        begun = time.perf_counter()
        for step in steps_of(stage, target):
            before = finished(folder, stage, step, facts)
            left = STAGE_SECONDS - (time.perf_counter() - begun)
            result = before or run_step(stage, step, folder, facts, environment, left)
            print(line(result, again=before is not None), flush=True)
            results.append(result)
    print(f"\n{render(results)}")
    return 1 if any(result["status"] in BAD for result in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
