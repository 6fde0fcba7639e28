"""Runs steps one after another, each in a process group of its own with a time limit, and keeps their results."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from pipeline.bench.gpu.packages import lacking
from pipeline.bench.gpu.step import PYTHON, RESULT, SCRATCH, Step
from pipeline.bench.junit import read_junit
from pipeline.host.provenance import ROOT

PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
OUT_OF_MEMORY, SKIPPED, NOT_RUN = "out of memory", "skipped", "not run"
FINAL = (PASSED, OUT_OF_MEMORY)
"""Statuses after which a step is not run again by the same code on the same device."""
BAD = (FAILED, TIMED_OUT, NOT_RUN)

LEAST = 10.0
"""Seconds below which no step is started."""
KILL_TIMEOUT = 5.0
"""Seconds from SIGTERM to SIGKILL."""
MEMORY_WORDS = re.compile(r"out of memory|OutOfMemoryError|bad_alloc", re.IGNORECASE)


@dataclass(frozen=True)
class Facts:
    """Where results come from: the same in each of them."""

    target: str
    driver: str | None
    versions: Mapping[str, str]
    commit: str | None
    sources: str
    """A digest of the source files, equal where the code is."""
    memory: int | None = None


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)


def result_file(folder: Path, stage: str, step: str) -> Path:
    return folder / f"{stage}-{slug(step)}.json"


def finished(folder: Path, stage: str, step: Step, facts: Facts) -> dict[str, Any] | None:
    """The result of an earlier run of the same code and step on the same device, where that one is final."""
    try:
        result = json.loads(result_file(folder, stage, step.name).read_text())
    except (OSError, ValueError):
        return None
    wanted = {
        "sources": facts.sources, "device": facts.target, "driver": facts.driver, "command": list(step.command),
        "versions": dict(facts.versions),
    }  # fmt: skip
    same = isinstance(result, dict) and all(result.get(key) == value for key, value in wanted.items())
    return result if same and not step.always and result.get("status") in FINAL else None


def run_step(
    stage: str, step: Step, folder: Path, facts: Facts, environment: Mapping[str, str], left: float
) -> dict[str, Any]:
    """Runs a step, writes its log and its JSON into ``folder``, and returns the latter.

    Args:
        left: seconds of the stage that remain, at most which the step gets.
    """
    limit = min(step.limit, left)
    result: dict[str, Any] = {
        "stage": stage, "step": step.name, "shows": step.shows, "status": NOT_RUN, "reason": None, "seconds": 0.0,
        "limit": limit, "command": list(step.command), "environment": dict(step.environment), "device": facts.target,
        "memory": facts.memory, "driver": facts.driver, "versions": dict(facts.versions), "commit": facts.commit,
        "sources": facts.sources, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "figures": {},
        "peer": step.peer,
    }  # fmt: skip
    missing = lacking(step.needs) + [
        tool for tool in step.tools if shutil.which(tool, path=environment.get("PATH")) is None
    ]
    if missing:
        result |= {"status": SKIPPED, "reason": f"{', '.join(missing)} not installed"}
    elif limit < LEAST:
        result |= {"reason": "the time of the stage is used up"}
    else:
        log = folder / f"{stage}-{slug(step.name)}.log"
        with tempfile.TemporaryDirectory(prefix="mnemos-gpu-") as scratch:
            output = Path(scratch) / "result"
            work = Path(scratch) / "work"
            work.mkdir()
            begun = time.perf_counter()
            code = _execute(step, output, work, log, environment, limit)
            result["seconds"] = time.perf_counter() - begun
            result["figures"], unreadable = _figures(step, output)
        result["status"], result["reason"] = _outcome(step, code, log, result["figures"], unreadable, limit)
        if result["status"] == TIMED_OUT and limit < step.limit:
            result |= {"status": NOT_RUN, "reason": f"the stage had {limit:.0f} s left, which were too few"}
    path = result_file(folder, stage, step.name)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(partial, path)
    return result


def _execute(
    step: Step, output: Path, work: Path, log: Path, environment: Mapping[str, str], limit: float
) -> int | None:
    """The exit status; None where the limit was reached and the whole process group ended."""
    names = {PYTHON: sys.executable, RESULT: str(output), SCRATCH: str(work)}
    words = [re.sub(r"\{(python|result|scratch)\}", lambda m: names[m[0]], word) for word in step.command]
    with log.open("w") as handle:
        handle.write(f"$ {' '.join(words)}\n")
        handle.flush()
        process = subprocess.Popen(
            words, cwd=ROOT, env={**environment, **step.environment}, stdin=subprocess.DEVNULL, stdout=handle,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Also what a step that has ended leaves behind.
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process group: by SIGTERM first where its leader still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_TIMEOUT)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _figures(step: Step, output: Path) -> tuple[dict[str, Any], str | None]:
    """What a step wrote, and why it cannot be read."""
    if step.writes == "nothing":
        return {}, None
    try:
        text = output.read_text()
    except OSError:
        return {}, "it wrote no figures"
    try:
        return (read_junit(text) if step.writes == "junit" else json.loads(text)), None
    except (ValueError, ParseError) as error:
        return {}, f"its figures cannot be read ({error})"


def _outcome(
    step: Step, code: int | None, log: Path, figures: Mapping[str, Any], unreadable: str | None, limit: float
) -> tuple[str, str | None]:
    """Status and reason."""
    if code is None:
        return TIMED_OUT, f"not done in {limit:.0f} s"
    # The first line is the command.
    text = log.read_text(errors="replace").partition("\n")[2]
    last = _last_line(text)
    if code == 0 and unreadable is None:
        try:
            failure = None if step.check is None else step.check(figures)
        except (KeyError, TypeError, IndexError) as error:
            failure = f"its figures are not as expected ({type(error).__name__}: {error})"
        if failure is None:
            return PASSED, None
        return (OUT_OF_MEMORY if step.measures and MEMORY_WORDS.search(failure) else FAILED), failure
    if figures.get("failures"):
        return FAILED, figures["failures"][0]
    # What a package needs is not in our lists.
    missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", last)
    if missing and missing[1] not in ("pipeline", "tests"):
        return SKIPPED, f"{missing[1]} not installed"
    if code != 0 and step.measures and (short := MEMORY_WORDS.search(text)):
        return OUT_OF_MEMORY, next(line.strip()[:300] for line in text.splitlines() if short[0] in line)
    return FAILED, last if code > 0 else f"ended by signal {-code}" if code < 0 else unreadable


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
