"""`bench throughput`: tokens/s, MFU and peak memory of training steps, one process group per sequence length.

Each length runs in processes of its own, because peak memory of a process never falls. Lengths are measured in turn,
`repeats` times over, and the medians compared, so that a machine whose speed drifts does not favour one of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.flags import parse_flags, parse_run, split_flags
from pipeline.errors import UserError
from pipeline.files.output import writing
from pipeline.host.local import LocalHost

if TYPE_CHECKING:
    from pipeline.config import RunConfig

MARK = "bench-result "
"""Starts the line that a case prints for its parent."""


@dataclass(frozen=True)
class ThroughputOptions:
    """What is measured; before the recipe and its own flags."""

    lengths: tuple[int, ...] = ()
    """Sequence lengths to compare; none: the recipe's."""
    ranks: int = 1
    """Ranks to start."""
    bench_steps: int = 3
    """Steps that are timed, after one of warm-up."""
    repeats: int = 1
    """Times that every length is measured, in turn."""
    json: Path | None = None
    """File for the results."""


def run_throughput(words: Sequence[str]) -> None:
    """The command: `bench throughput [--lengths 2048 16384] [--ranks N] RECIPE [flags]`."""
    own, rest = _split(words)
    options: ThroughputOptions = parse_flags(ThroughputOptions(), own, "mnemos bench throughput")
    config = parse_run(rest or ["miras_tiny"], "bench throughput", options)
    lengths = options.lengths or (config.sequence_length,)
    runs: dict[int, list[dict[str, Any]]] = {length: [] for length in lengths}
    for _ in range(options.repeats):
        for length in lengths:
            runs[length].append(_start(rest or ["miras_tiny"], length, options))
    rows = [_median(runs[length]) for length in lengths]
    first = rows[0]
    for row in rows:
        row["time_per_token_ratio"] = row["seconds_per_token"] / first["seconds_per_token"]
    result = {
        "recipe": config.recipe,
        "options": dataclasses.asdict(options),
        "rows": rows,
        **runs[lengths[0]][0]["facts"],
    }
    print(render(result))
    if options.json is not None:
        with writing(options.json):
            options.json.write_text(json.dumps(result, indent=2, default=str) + "\n")


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own flags, wherever they stand; --lengths takes every number that follows."""
    own: list[str] = []
    pending = list(words)
    if "--lengths" in pending:
        start = pending.index("--lengths")
        end = start + 1
        while end < len(pending) and pending[end].isdigit():
            end += 1
        own, pending = pending[start:end], pending[:start] + pending[end:]
    more, rest = split_flags(pending, ("ranks", "bench-steps", "repeats", "json"))
    return own + more, rest


def _start(rest: Sequence[str], length: int, options: ThroughputOptions) -> dict[str, Any]:
    words = ["pipeline", "bench", "throughput-case", *rest, "--sequence-length", str(length)]
    words += ["--steps", str(options.bench_steps + 1)]
    if options.ranks == 1:
        command = [sys.executable, "-m", *words]
    else:
        launcher = Path(sys.executable).parent / "deepspeed"
        command = [
            *(str(launcher), "--hostfile", os.devnull, "--num_gpus", str(options.ranks)),
            *("--master_port", str(LocalHost(os.environ).free_port()), "--module", *words),
        ]
    done = subprocess.run(command, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if line is None:
        if "Traceback" in done.stderr:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        tail = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no output"]
        # A launcher prints more lines after that of the error.
        why = next((line for line in reversed(tail) if "OutOfMemoryError" in line), tail[-1])
        raise UserError(f"the run at {length} tokens failed: {why.strip()}")
    return json.loads(line.removeprefix(MARK))


def run_case(words: Sequence[str]) -> None:
    """One length, on every rank: trains without saving or evaluating, and rank 0 prints the figures."""
    config = parse_run(words, "bench throughput-case", ranks=int(os.environ.get("WORLD_SIZE", "1")))
    from pipeline.create_run import create_run
    from pipeline.host.hardware import peak_flops, utilisation
    from pipeline.host.versions import versions
    from pipeline.load import checked_system, resolve
    from pipeline.meter import Meter
    from pipeline.runtime.ranks import describe_devices, start, stop
    from pipeline.train import Trainer

    topology = start(config)
    try:
        resolved = resolve(config, checked_system(config, topology), topology)
        system = resolved.system
        run = create_run(resolved, topology)
        trainer = Trainer(run)
        meter, seconds, records = Meter(run), [], []
        for step in range(1, config.steps + 1):
            begun = time.perf_counter()
            records.append(meter.record(step, trainer.step(step, meter)))
            seconds.append(time.perf_counter() - begun)
        # The first step compiles and warms up.
        median = statistics.median(seconds[1:] or seconds)
        tok_s = run.tokens_per_step / median
        flops = system.flops(config.sequence_length, run.phase).total
        figures = {
            "sequence_length": config.sequence_length,
            "tokens_per_step": run.tokens_per_step,
            "seconds": median,
            "seconds_per_token": median / run.tokens_per_step,
            "tok_s": tok_s,
            "flops_per_token": flops,
            "mfu": utilisation(tok_s, flops, topology.world, peak_flops(config.report.peak_tflops)),
            "peak_memory": records[-1].peak_memory,
            "first_step": {"loss": records[0].loss, "grad_norm": records[0].grad_norm},
            "planned_memory": _planned_memory(config, topology.world),
            "facts": {"machine": describe_devices(topology), "versions": versions()},
        }
        if topology.rank == 0:
            print(MARK + json.dumps(figures), flush=True)
    finally:
        stop()


def _planned_memory(config: RunConfig, ranks: int) -> int | None:
    """Bytes that `plan` expects on this device; None on a CPU, and on a GPU that it does not know."""
    import torch

    from pipeline.host.devices import find_device
    from pipeline.host.hardware import on_gpu
    from pipeline.plan import PlanOptions, make_plan

    device = find_device(torch.cuda.get_device_name()) if on_gpu() else None
    return None if device is None else make_plan(config, PlanOptions(ranks=ranks, device=device.name)).memory


def _median(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over repeats of what is measured; the rest is the same in every repeat."""
    row = {key: value for key, value in runs[0].items() if key != "facts"}
    for key in ("seconds", "seconds_per_token", "tok_s", "mfu", "peak_memory"):
        values = [run[key] for run in runs]
        row[key] = None if None in values else statistics.median(values)
    return row


def render(result: dict[str, Any]) -> str:
    """The results as a table under the machine and the versions."""
    device = result["machine"]["device"]
    used = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    lines = [f"{result['recipe']} on {result['machine']['ranks']} x {device['name']}; {used}"]
    lines.append(f"{'tokens':>10} {'s/step':>9} {'tok/s':>10} {'us/token':>9} {'ratio':>6} {'MFU':>6} {'GiB':>7}")
    for row in result["rows"]:
        mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"{row['sequence_length']:>10} {row['seconds']:>9.3f} {row['tok_s']:>10.0f}"
            f" {1e6 * row['seconds_per_token']:>9.2f} {row['time_per_token_ratio']:>6.2f} {mfu:>6}"
            f" {row['peak_memory'] / 2**30:>7.2f}"
        )
    return "\n".join(lines)
