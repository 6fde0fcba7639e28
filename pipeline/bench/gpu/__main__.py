"""`python -m pipeline.bench.gpu [STAGE ...]`, which `make gpu` calls. Reads OUT and WHEELS from the environment."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pipeline.bench.gpu.packages import install_missing, versions
from pipeline.bench.gpu.runner import BAD, Facts, finished, run_step
from pipeline.bench.gpu.step import STAGE_SECONDS
from pipeline.bench.gpu.steps import STAGES, steps_of
from pipeline.bench.gpu.table import line, render
from pipeline.bench.gpu.target import device_environment, find_target
from pipeline.errors import UserError
from pipeline.host.provenance import ROOT, commit, sources_digest

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
    site = ROOT / "build" / "gpu-packages"
    # What an earlier call installed is there.
    sys.path.append(str(site))
    if wheels := environment.get("WHEELS"):
        installed = install_missing(Path(wheels).absolute(), site)
        print(f"installed {len(installed)} packages from {wheels}" if installed else f"{wheels}: nothing is missing")
        importlib.invalidate_caches()
    if site.is_dir():
        paths.append(str(site))
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [environment.get("PYTHONPATH")])])
    tools = [str(Path(environment.get("CUDA_HOME") or "/usr/local/cuda") / "bin")]
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", ""), *tools])
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
            print(line(result, earlier=before is not None), flush=True)
            results.append(result)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{render(results)}")
    return 1 if any(result["status"] in BAD and not result["peer"] for result in results) else 0


def _exit(signum: int, _: object) -> NoReturn:
    sys.exit(128 + signum)


if __name__ == "__main__":
    # A step is in a process group of its own, which ends with this process only where this one unwinds.
    signal.signal(signal.SIGTERM, _exit)
    sys.exit(main(sys.argv[1:]))
