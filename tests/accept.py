"""`make accept`: long experiments, minutes to an hour each, that show a claim of the project as a whole.

    python -m tests.accept            lists them
    python -m tests.accept NAME       runs one, writes OUT/NAME.json and prints a line for docs/results.md

An experiment of several long runs keeps them in OUT/NAME, and goes on with them when it is started again.

An experiment is one or several tests marked `slow`. What they hand to pytest's `record_property` are its figures; their
assertions decide whether it is accepted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.bench.junit import read_junit
from pipeline.host.provenance import ROOT, commit
from pipeline.host.versions import versions
from pipeline.parallel.topology import Topology
from pipeline.runtime.ranks import describe_devices

KEPT = "ACCEPT_KEPT"
"""Environment variable: the folder of an experiment's runs."""


@dataclass(frozen=True)
class Experiment:
    """A claim, and the tests that show it."""

    claim: str
    tests: tuple[str, ...]
    """Files or node ids."""
    minutes: int
    """About, on two cores."""
    keywords: str = ""
    """As pytest's -k takes them."""


EXPERIMENTS = {
    "kills": Experiment(
        "100 SIGKILLs at random moments of training and saving cost no bit",
        ("tests/launch/test_kill.py",), 30, "hundred",
    ),
    "phases": Experiment(
        "50 SIGKILLs around the switches of a run of three phases cost no bit",
        ("tests/launch/test_kill.py",), 5, "fifty",
    ),
    "family": Experiment(
        "every rule of the family recalls what lies beyond the window", ("tests/launch/test_recall.py",), 25,
    ),
    "attachments": Experiment(
        "the memory recalls wherever it is attached",
        ("tests/systems/miras/test_attachments.py",), 10, "recall_beyond_the_window",
    ),
    "smollm2_rate": Experiment(
        "a step of miras_smollm2 takes at most 1.5 times its own matrix products",
        ("tests/systems/miras/test_smollm2.py",), 7, "matrix_products",
    ),
    "miras_smollm2": Experiment(
        "a trained memory closes a third of the gap between a window and full attention",
        ("tests/launch/test_gap_closed.py",), 170,
    ),
    "miras_recall_long": Experiment(
        "trained on distances to 1K tokens, it recalls eight pairs after a million",
        ("tests/launch/test_recall_long.py",), 30,
    ),
    "olmo_tiny": Experiment(
        "a small OLMo predicts the standard library to less than 2.6 bits per byte in less than four minutes",
        ("tests/launch/test_olmo_tiny.py",), 9,
    ),
    "export": Experiment(
        "a checkpoint that one or two ranks save is one export, which computes the same where only transformers is",
        ("tests/launch/test_export.py",), 8,
    ),
    "compiled": Experiment(
        "compiled blocks train as others do",
        ("tests/test_compilation.py", "tests/systems/neuromorphic/test_compile.py"), 6, "train_alike",
    ),
    "long_prompt": Experiment(
        "a prompt of a million tokens is read in the memory and at the speed of a short one",
        ("tests/systems/miras/decoding/test_long_prompt.py",), 10,
    ),
    "dense_speed": Experiment(
        "a step of a decoder is as fast here as in a plain PyTorch loop",
        ("tests/bench/test_dense.py",), 10,
    ),
    "mimir_speed": Experiment(
        "a step of peptide diffusion is as fast here as in a plain PyTorch loop",
        ("tests/systems/mimir/test_speed.py",), 2,
    ),
    "memory_step": Experiment(
        "a token of the memory takes at most 3 times as long as to read and write M and S once",
        ("tests/bench/test_decode.py",), 1,
    ),
    "limits": Experiment(
        "what is stored fades as theory says, and the native scan does not drift over a million tokens",
        ("tests/ops/test_memory_limits.py",), 10,
    ),
    "token_files": Experiment(
        "token files are made at the tokenizer's speed, and read at 10 M tokens/s by a rank",
        ("tests/data/tokens/test_speed.py",), 3,
    ),
    "mimir": Experiment(
        "peptide diffusion learns a known process to 5 % of its entropy, its motifs, and targets that it never saw",
        ("tests/systems/mimir/test_experiment.py",), 10,
    ),
    "cvfp": Experiment(
        "contexts by a fixed point converge, keep their rank, and are worth a tenth of the perplexity",
        ("tests/systems/cvfp/test_experiment.py",), 90,
    ),
    "cvfp_speed": Experiment(
        "a pass of the fixed point takes little more than its own matrix products",
        ("tests/systems/cvfp/test_speed.py",), 12,
    ),
    "neuromorphic": Experiment(
        "facts that the window no longer sees are known by the memories, within a document and in later ones",
        ("tests/systems/neuromorphic/test_experiment.py",), 12,
    ),
    "neuromorphic_speed": Experiment(
        "a step of three memories is near its own matrix products, and its time of a token does not grow with rows",
        ("tests/systems/neuromorphic/test_speed.py",), 4,
    ),
    "cvfp_tradeoff": Experiment(
        "contexts with diversity in the loss have more rank, and come to rest later, than without",
        ("tests/systems/cvfp/test_tradeoff.py",), 5,
    ),
    "drift": Experiment(
        "the native scan does not drift over 131,072 tokens", ("tests/ops/test_scan_cpu.py",), 3, "drift",
    ),
}  # fmt: skip


def main(words: Sequence[str], experiments: Mapping[str, Experiment] = EXPERIMENTS) -> int:
    """Exit status: 0 accepted, or listed; 1 not accepted; 2 for a name that is none."""
    if not words:
        width = max(map(len, experiments))
        print("\n".join(f"{name:<{width}}  {e.claim} (about {e.minutes} min)" for name, e in experiments.items()))
        return 0
    if len(words) != 1 or words[0] not in experiments:
        print(f"make accept: NAME is {' '.join(words)!r}: one of {', '.join(experiments)}", file=sys.stderr)
        return 2
    (name,) = words
    folder = Path(os.environ.get("OUT") or ROOT / "outputs" / "accept")
    folder.mkdir(parents=True, exist_ok=True)
    result = run(name, experiments[name], folder / name)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=2, default=str) + "\n")
    print(f"\n{line(result)}\n\nwritten to {path}")
    return 0 if result["accepted"] else 1


def run(name: str, experiment: Experiment, kept: Path) -> dict[str, Any]:
    """Runs the tests of an experiment in a process of their own, with their output on this terminal. They may keep runs
    in the folder `kept`."""
    environment = {**os.environ, KEPT: str(kept)}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "slow", "-s", f"--junitxml={report}", *experiment.tests]
        command += ["-k", experiment.keywords] if experiment.keywords else []
        begun = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        seconds = time.perf_counter() - begun
        tests = read_junit(report.read_text()) if report.exists() else {"passed": 0, "properties": {}}
    return {
        "name": name, "claim": experiment.claim, "accepted": code == 0 and tests["passed"] > 0, "tests": tests,
        "figures": tests["properties"], "seconds": seconds, "command": f"make accept NAME={name}", "commit": commit(),
        "versions": versions(), "machine": describe_devices(Topology()),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def line(result: Mapping[str, Any]) -> str:
    """A row of the table in docs/results.md: claim, outcome, figures, time, commit and date, command."""
    figures = "; ".join(f"{name} {value}" for name, value in result["figures"].items()) or "-"
    outcome = "accepted" if result["accepted"] else "not accepted"
    source = f"{(result['commit'] or 'no commit')[:8]}, {result['written'][:10]}"
    minutes = f"{result['seconds'] / 60:.1f} min"
    return f"| {result['claim']} | {outcome} | {figures} | {minutes} | {source} | `{result['command']}` |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
