"""`bench dense`: training steps of a decoder here and in a plain PyTorch loop, in turn, in one run.

The plain loop is transformers' own model with torch.optim.AdamW and gradient clipping, on one process or under
DistributedDataParallel, from the same weights and on the same rows. Speeds are compared within a round, so that a
machine whose speed drifts favours neither.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.commands.flags import parse_flags, parse_run, split_flags
from pipeline.errors import UserError
from pipeline.files.output import writing
from pipeline.host.local import LocalHost

MARK = "bench-result "
"""Starts the line that a case prints for its parent."""
DEFAULT = (
    "olmo_tiny", "--model.backbone.width", "512", "--model.backbone.layers", "8", "--model.backbone.heads", "8",
    "--model.backbone.kv-heads", "8", "--model.backbone.ffn", "2048", "--sequence-length", "1024", "--batch-size", "4",
)  # fmt: skip
"""4,096 tokens a step."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Contender:
    """A way to make a step."""

    name: str
    ranks: int
    zero: str | None
    """The engine's configuration; None: the plain loop."""
    precision: str
    compiled: bool = False
    against: str | None = None
    """The plain loop whose speed is 1."""
    goal: float | None = None
    """The least speed that is wanted, as a multiple of that."""


PLAIN, DDP = "plain, fp32", "DDP on 2 ranks, fp32"
CONTENDERS = (
    Contender(PLAIN, 1, None, "fp32"),
    Contender("zero0, fp32", 1, "zero0", "fp32", against=PLAIN, goal=0.9),
    Contender("zero0, bf16", 1, "zero0", "bf16", against=PLAIN, goal=1.6),
    Contender("zero0, fp32, compiled", 1, "zero0", "fp32", compiled=True, against=PLAIN),
    Contender(DDP, 2, None, "fp32"),
    Contender("zero3 on 2 ranks, fp32", 2, "zero3", "fp32", against=DDP, goal=0.75),
)


@dataclass(frozen=True)
class DenseOptions:
    """What is compared; before the recipe and its own flags, which describe the decoder and its step."""

    rounds: int = 8
    """Steps of every contender, in turn, after one of warm-up."""
    threads: int = 2
    """CPU threads in all: of one process, or of two ranks together."""
    ranks: tuple[int, ...] = (1, 2)
    """Numbers of ranks that are compared: 1, 2."""
    compile: bool = False
    """Compare --compile too."""
    json: Path | None = None
    """File for the results."""


def run_dense(words: Sequence[str]) -> None:
    """The command: `bench dense [--rounds N] [--threads N] [--ranks 1 2] [--compile] [RECIPE] [flags]`."""
    own, rest = _split(words)
    options: DenseOptions = parse_flags(DenseOptions(), own, "mnemos bench dense")
    if options.rounds < 1:
        raise UserError(f"--rounds is {options.rounds}: give 1 or more")
    if options.threads < 1:
        raise UserError(f"--threads is {options.threads}: give 1 or more")
    if not options.ranks or not set(options.ranks) <= {1, 2}:
        raise UserError(f"--ranks is {' '.join(map(str, options.ranks)) or 'empty'}: give 1, 2, or both")
    if not rest or rest[0].startswith("-"):
        rest = [*DEFAULT, *rest]
    config = parse_run(rest, "bench dense", options)
    if config.grad_accum > 1:
        raise UserError(f"--grad-accum is {config.grad_accum}: the plain loop has one micro-batch a step: give 1")
    if config.data.document_mask:
        raise UserError(
            "--data.document-mask: the plain loop sees across documents, so it is no comparison: leave it out"
        )
    z_loss = getattr(config.model, "z_loss", 0.0)
    if z_loss:
        raise UserError(f"--model.z-loss is {z_loss}: the plain loop has none: give 0")
    ranks = sorted(set(options.ranks))
    if config.batch_size % ranks[-1]:
        raise UserError(f"--batch-size is {config.batch_size}: two ranks share these rows: give an even number")
    cases = [_start(rest, count, options) for count in ranks]
    rows = [row for case in cases for row in compare(case["seconds"], config.batch_size * config.sequence_length)]
    result = {
        "recipe": config.recipe, "flags": rest[1:], "options": dataclasses.asdict(options), "rows": rows,
        "rounds": {name: seconds for case in cases for name, seconds in case["seconds"].items()},
        "losses": {name: loss for case in cases for name, loss in case["losses"].items()},
        "tokens_per_step": config.batch_size * config.sequence_length, "parameters": cases[0]["parameters"],
        **cases[0]["facts"],
    }  # fmt: skip
    print(render(result))
    if options.json is not None:
        with writing(options.json):
            options.json.write_text(json.dumps(result, indent=2, default=str) + "\n")


def contenders(ranks: int, *, compiled: bool) -> list[Contender]:
    """Those that run on so many ranks."""
    return [c for c in CONTENDERS if c.ranks == ranks and (compiled or not c.compiled)]


def _start(rest: Sequence[str], ranks: int, options: DenseOptions) -> dict[str, Any]:
    """Runs the contenders of a number of ranks, in processes of their own."""
    words = ["pipeline", "bench", "dense-case", str(options.rounds), str(int(options.compile)), *rest]
    if ranks == 1:
        command = [sys.executable, "-m", *words]
    else:
        launcher = Path(sys.executable).parent / "deepspeed"
        command = [
            *(str(launcher), "--hostfile", os.devnull, "--num_gpus", str(ranks)),
            *("--master_port", str(LocalHost(os.environ).free_port()), "--module", *words),
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, options.threads // ranks))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if line is None:
        if "Traceback" in done.stderr:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        output = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        reason = next((text for text in output if text.startswith("mnemos: ")), output[-1])
        raise UserError(f"the steps on {ranks} ranks failed: {reason.removeprefix('mnemos: ')}")
    return json.loads(line.removeprefix(MARK))


def compare(seconds: Mapping[str, Sequence[float]], tokens: int) -> list[dict[str, Any]]:
    """A row for each contender, of its seconds by round."""
    rows = []
    for contender in CONTENDERS:
        if contender.name not in seconds:
            continue
        own = seconds[contender.name]
        row: dict[str, Any] = {
            "name": contender.name, "seconds": statistics.median(own), "tok_s": tokens / statistics.median(own),
            "against": contender.against, "speed": None, "interval": None, "goal": contender.goal, "reached": None,
        }  # fmt: skip
        if contender.against is not None:
            speeds = [plain / mine for plain, mine in zip(seconds[contender.against], own, strict=True)]
            row["speed"], row["interval"] = statistics.median(speeds), interval(speeds)
            row["reached"] = None if contender.goal is None else row["speed"] >= contender.goal
        rows.append(row)
    return rows


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median: percentiles over resampled rounds."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1]


def render(result: Mapping[str, Any]) -> str:
    """The results as a table under the machine and the versions."""
    machine, used = result["machine"], ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v)
    device = machine["device"]
    where = f"{device['name']}, {device['cores']} cores" if device["kind"] == "cpu" else device["name"]
    size = f"{result['parameters']:,} parameters, {result['tokens_per_step']:,} tokens a step"
    lines = [
        f"{result['recipe']}: {size}, on {where}, {result['options']['threads']} threads",
        used,
        f"{'':<24} {'s/step':>8} {'tok/s':>8} {'speed':>6} {'95 %':>12}  of",
    ]
    for row in result["rows"]:
        line = f"{row['name']:<24} {row['seconds']:>8.3f} {row['tok_s']:>8.0f}"
        if row["speed"] is not None:
            low, high = row["interval"]
            line += f" {row['speed']:>6.2f} {f'{low:.2f}-{high:.2f}':>12}  {row['against']}"
        if row["goal"] is not None:
            line += f"; goal {row['goal']:.2f}: {'reached' if row['reached'] else 'not reached'}"
        lines.append(line)
    return "\n".join(lines)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own flags, wherever they stand, and the others."""
    return split_flags(words, ("rounds", "threads", "json"), numbers="ranks", switches=("compile",))
