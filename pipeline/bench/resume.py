"""`bench resume`: what saving and loading a checkpoint costs, against plain `torch.save` of as many bytes.

The run is real: ranks, steps, and the saver that `train` uses. The baseline is measured in the same processes, in turn
with what it is compared to: every rank writes one file with its share of the checkpoint's bytes, and syncs it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.flags import parse_flags, parse_run, pop_flag, split_flags, wants_help
from pipeline.errors import UserError
from pipeline.files.output import writing
from pipeline.host.local import LocalHost

if TYPE_CHECKING:
    from pipeline.bench.saves import Saves

MARK = "bench-resume "
"""Starts the line that a case prints for its parent."""
BACKBONE = {"layers": 8, "width": 512, "heads": 8, "kv-heads": 8, "ffn": 2048}
DEFAULT = (
    "miras_tiny", "--batch-size", "1", "--sequence-length", "256",
    *(word for name, value in BACKBONE.items() for word in (f"--model.backbone.{name}", str(value))),
)  # fmt: skip
"""miras_tiny, made wide enough for a checkpoint of more than 500 MB: 35 million parameters, 16 bytes each."""
MOST_STEPS = 500
"""Steps that are taken at most while an asynchronous save is written."""


@dataclass(frozen=True)
class ResumeOptions:
    """What is measured; before the recipe and its own flags."""

    ranks: int = 2
    """Ranks to start."""
    bench_steps: int = 3
    """Steps that are timed alone, in every repeat."""
    repeats: int = 5
    """Times that everything is measured, in turn."""
    json: Path | None = None
    """File for the results."""


def run_resume(words: Sequence[str]) -> None:
    """The command: `bench resume [--ranks N] [--repeats N] [--json FILE] [RECIPE] [flags]`."""
    own, rest = split_flags(words, ("ranks", "bench-steps", "repeats", "json"))
    options: ResumeOptions = parse_flags(ResumeOptions(), own, "mnemos bench resume")
    for name in ("ranks", "bench-steps", "repeats"):
        if getattr(options, name.replace("-", "_")) < 1:
            raise UserError(f"--{name} is {getattr(options, name.replace('-', '_'))}: give 1 or more")
    if not wants_help(rest) and (not rest or (rest[0].startswith("-") and pop_flag(rest, "--config")[0] is None)):
        rest = [*DEFAULT, *rest]
    config = parse_run(rest, "bench resume", options)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: no such folder: make it first")
    place = _existing(config.output_dir)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".bench-resume-", dir=place))
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}: name a folder that can be written with --output-dir") from error
    try:
        result = _start(rest, folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {"recipe": config.recipe, "words": rest, "options": dataclasses.asdict(options), **result}
    print(render(result))
    if options.json is not None:
        with writing(options.json):
            options.json.write_text(json.dumps(result, indent=2, default=str) + "\n")


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that exists: the file system that a run would save to."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _start(rest: Sequence[str], folder: Path, options: ResumeOptions) -> dict[str, Any]:
    rest = list(rest)
    for flag in ("--output-dir", "--run-name", "--run-id"):
        for form in (flag, f"--{flag[2:].replace('-', '_')}"):
            _, rest = pop_flag(rest, form)
    counts = [str(options.repeats), str(options.bench_steps)]
    words = ["pipeline", "bench", "resume-case", *counts, *rest, "--output-dir", str(folder)]
    if options.ranks == 1:
        command = [sys.executable, "-m", *words]
    else:
        launcher = Path(sys.executable).parent / "deepspeed"
        command = [
            *(str(launcher), "--hostfile", os.devnull, "--num_gpus", str(options.ranks)),
            *("--master_port", str(LocalHost(os.environ).free_port()), "--module", *words),
        ]
    threads = str(max(1, LocalHost(os.environ).cores() // options.ranks))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if line is None:
        output = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        reason = next((text for text in output if text.startswith("mnemos: ")), output[-1])
        raise UserError(f"the run that saves failed: {reason.removeprefix('mnemos: ')}")
    return json.loads(line.removeprefix(MARK))


def run_case(words: Sequence[str]) -> None:
    """The measurement, on every rank, given repeats, steps and the recipe's words; rank 0 prints the figures."""
    repeats, steps, words = int(words[0]), int(words[1]), words[2:]
    config = parse_run(words, "bench resume-case", ranks=int(os.environ.get("WORLD_SIZE", "1")))
    from pipeline.bench.saves import Saves
    from pipeline.host.versions import versions
    from pipeline.runtime.ranks import describe_devices, start, stop

    topology = start(config)
    try:
        with Saves(config, topology) as saves:
            first = warm_up(saves)
            rounds = [measure(saves, steps) for _ in range(repeats)]
            result = {
                "bytes": saves.bytes_by_kind(),
                "parameters": saves.parameters(),
                "first_stall": first,
                "save_every": config.save_every,
                "rounds": rounds,
                **summary(rounds, config.save_every),
                "machine": describe_devices(topology),
                "versions": versions(),
            }
        if topology.rank == 0:
            print(MARK + json.dumps(result), flush=True)
    finally:
        stop()


def warm_up(saves: Saves) -> float:
    """A step, and a save of each kind; returns the stall of the asynchronous one, which sets its memory aside."""
    saves.step()
    saves.save()
    saves.step()
    stall = saves.begin()
    saves.finish()
    saves.load()
    return stall


def measure(saves: Saves, steps: int) -> dict[str, Any]:
    """One round: steps alone, the baseline, a save, a save while steps go on, a load. Seconds.

    Pages and blocks that were just freed are taken twice as fast as others: what is timed comes after a plain file that
    is written and removed, each time.
    """
    alone = [saves.step() for _ in range(steps)]
    saves.plain()
    plain, plain_load = saves.plain()
    save = saves.save()
    alone.append(saves.step())
    begun = time.perf_counter()
    copied, waited, done = saves.begin(), 0.0, False
    meanwhile: list[float] = []
    while not done and len(meanwhile) < MOST_STEPS:
        meanwhile.append(saves.step())
        seconds, done = saves.poll()
        waited += seconds
    if not done:
        waited += saves.finish()
    committed = time.perf_counter() - begun
    return {
        "alone": alone, "meanwhile": meanwhile, "plain": plain, "plain_load": plain_load, "save": save,
        "copied": copied, "stall": copied + waited, "committed": committed, "load": saves.load(),
    }  # fmt: skip


def summary(rounds: Sequence[dict[str, Any]], save_every: int) -> dict[str, Any]:
    """Medians over rounds, and what they come to."""

    def median(key: str) -> float:
        return statistics.median(found[key] for found in rounds)

    step = statistics.median(seconds for found in rounds for seconds in found["alone"])
    meanwhile = statistics.median(seconds for found in rounds for seconds in found["meanwhile"])
    # What training loses in all: the wait, and what the steps beside it took longer.
    lost = statistics.median(
        found["stall"] + sum(found["meanwhile"]) - step * len(found["meanwhile"]) for found in rounds
    )
    # Ratios within a round: a disk whose speed drifts favours neither side.
    result = {
        "step": step,
        "plain": median("plain"),
        "save": median("save"),
        "save_ratio": statistics.median(found["save"] / found["plain"] for found in rounds),
        "stall": median("stall"),
        "stall_ratio": statistics.median(found["stall"] / found["plain"] for found in rounds),
        "copied": median("copied"),
        "committed": median("committed"),
        "step_meanwhile": meanwhile,
        "slow_down": meanwhile / step,
        "steps_meanwhile": statistics.median(len(found["meanwhile"]) for found in rounds),
        "lost": lost,
        "plain_load": median("plain_load"),
        "load": median("load"),
        "load_ratio": statistics.median(found["load"] / found["plain_load"] for found in rounds),
    }
    if save_every:
        trained = save_every * step
        result["share_save"] = result["save"] / (trained + result["save"])
        result["share_background"] = max(0.0, lost) / (trained + max(0.0, lost))
    return result


def render(result: dict[str, Any]) -> str:
    """The results as a table under the machine and the versions."""
    device = result["machine"]["device"]
    used = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    size = result["bytes"]
    parts = ", ".join(f"{kind} {size[kind] / 1e6:.1f}" for kind in ("shards", "trainable", "carry", "other"))
    lines = [
        f"{result['recipe']} on {result['machine']['ranks']} x {device['name']}; {used}",
        f"checkpoint {size['total'] / 1e6:.1f} MB: {parts}; {size['frozen'] / 1e6:.1f} MB of frozen weights left out",
        f"{result['parameters']['trained']:,} of {result['parameters']['all']:,} parameters are trained",
        "",
        f"{'':<34} {'seconds':>8} {'least-most':>15} {'MB/s':>7} {'ratio':>6}",
    ]
    # The copy, and what the loop asks and commits between its steps.
    rows: list[tuple[str, str, float | None]] = [
        ("plain torch.save and fsync", "plain", 1.0),
        ("save, synchronous", "save", result["save_ratio"]),
        ("save, asynchronous: training waits", "stall", result["stall_ratio"]),
        ("save, asynchronous: until committed", "committed", None),
        ("plain torch.load", "plain_load", 1.0),
        ("load", "load", result["load_ratio"]),
    ]
    for name, key, ratio in rows:
        values = [found[key] for found in result["rounds"]]
        speed = f"{size['total'] / result[key] / 1e6:>7.0f}" if key != "stall" else "-".rjust(7)
        against = "-".rjust(6) if ratio is None else f"{ratio:>6.2f}"
        span = f"{min(values):.3f}-{max(values):.3f}"
        lines.append(f"{name:<34} {result[key]:>8.3f} {span:>15} {speed} {against}")
    beside = f"{result['slow_down']:.2f} times; {result['steps_meanwhile']:g} steps"
    first = f"the first waits {result['first_stall']:.3f} s"
    lines += [
        "",
        f"step: {result['step']:.3f} s alone, {result['step_meanwhile']:.3f} s while a save is written ({beside})",
        f"an asynchronous save costs {result['lost']:.3f} s in all, its wait and its slower steps ({first})",
    ]
    if "share_save" in result:
        lines.append(
            f"--save-every {result['save_every']}: {result['share_save']:.2%} of the time for synchronous saves,"
            f" {result['share_background']:.2%} for asynchronous ones"
        )
    return "\n".join(lines)
