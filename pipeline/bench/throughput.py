"""`bench throughput`: tokens/s, MFU and peak memory of training steps, one process group per sequence length.

A CPU has no data sheet: there the share is that of the rate of its own matrix products, measured beside the steps.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.flags import parse_flags, parse_run, pop_duration, split_flags
from pipeline.errors import UserError
from pipeline.files.output import writing
from pipeline.host.local import LocalHost

if TYPE_CHECKING:
    import torch

    from pipeline.config import RunConfig
    from pipeline.parallel.topology import Topology

MATRIX = 1024
"""Rows and columns of the matrices whose products a CPU is measured by."""
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
    _, rest = pop_duration(rest)  # --bench-steps is how many there are
    options: ThroughputOptions = parse_flags(ThroughputOptions(), own, "mnemos bench throughput")
    for flag in ("ranks", "bench-steps", "repeats"):
        value = getattr(options, flag.replace("-", "_"))
        if value < 1:
            raise UserError(f"--{flag} is {value}: give 1 or more")
    if any(length < 1 for length in options.lengths):
        raise UserError(f"--lengths is {' '.join(map(str, options.lengths))}: give 1 token or more each")
    config = parse_run(rest or ["miras_tiny"], "bench throughput", options)
    lengths = options.lengths or (config.sequence_length,)
    runs: dict[int, list[dict[str, Any]]] = {length: [] for length in lengths}
    for _ in range(options.repeats):
        for length in lengths:
            runs[length].append(_start(rest or ["miras_tiny"], length, options))
    rows = [_median(runs[length]) for length in lengths]
    for row in rows:
        check_share(row)
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
        raise UserError(f"the run at {length} tokens failed: {reason_of(done)}")
    return json.loads(line.removeprefix(MARK))


def reason_of(done: subprocess.CompletedProcess[str]) -> str:
    """Why a case has no figures: its own line of an error, or the last that it printed."""
    tail = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
    # A launcher prints more lines after that of the error.
    own = (line for line in reversed(tail) if line.startswith("mnemos: ") or "OutOfMemoryError" in line)
    why = next(own, tail[-1])
    return why.strip().removeprefix("mnemos: ")


def run_case(words: Sequence[str]) -> None:
    """One length, on every rank: trains without saving or evaluating, and rank 0 prints the figures."""
    config = parse_run(words, "bench throughput-case", ranks=int(os.environ.get("WORLD_SIZE", "1")))
    from pipeline.create_run import create_run
    from pipeline.host.hardware import peak_flops, share_of_peak
    from pipeline.host.versions import versions
    from pipeline.load import checked_system, resolve
    from pipeline.meter import Meter
    from pipeline.precision import precision_of
    from pipeline.runtime.ranks import describe_devices, start, stop
    from pipeline.train import Trainer

    topology = start(config)
    try:
        resolved = resolve(checked_system(config, topology), topology)
        system = resolved.system
        run = create_run(resolved, topology)
        trainer = Trainer(run)
        dtype = precision_of(config)
        rate = matrix_rate(dtype, topology)
        meter, seconds, records = Meter(run), [], []
        for step in range(1, config.steps + 1):
            begun = time.perf_counter()
            records.append(meter.record(step, trainer.step(step, meter)))
            seconds.append(time.perf_counter() - begun)
        # The first step compiles and warms up.
        median = statistics.median(seconds[1:] or seconds)
        tok_s = run.tokens_per_step / median
        flops = system.flops(config.sequence_length, run.phase).total
        if rate is not None:
            rate = max(rate, matrix_rate(dtype, topology) or 0.0)
        figures = {
            "sequence_length": config.sequence_length,
            "tokens_per_step": run.tokens_per_step,
            "seconds": median,
            "seconds_per_token": median / run.tokens_per_step,
            "tok_s": tok_s,
            "flops_per_token": flops,
            "mfu": share_of_peak(tok_s, flops, topology.world, peak_flops(config.report.peak_tflops)),
            "matrix_flops": rate,
            "matrix_share": share_of_peak(tok_s, flops, 1, rate),
            "dtype": str(dtype).removeprefix("torch."),
            "peak_memory": records[-1].peak_memory,
            "first_step": {"loss": records[0].loss, "grad_norm": records[0].grad_norm},
            "planned_memory": _planned_memory(config, topology.world),
            "facts": {"machine": describe_devices(topology), "versions": versions()},
        }
        if topology.rank == 0:
            print(MARK + json.dumps(figures), flush=True)
    finally:
        stop()


def matrix_rate(dtype: torch.dtype, topology: Topology) -> float | None:
    """FLOP/s of square matrix products on all ranks at once, with the threads that each has now, added up; None on a
    GPU. Collective."""
    import torch
    import torch.distributed as dist

    from pipeline.host.hardware import measured_flops, on_gpu

    if on_gpu():
        return None
    if topology.world > 1:
        dist.barrier()
    total = torch.tensor(measured_flops(dtype, MATRIX), dtype=torch.float64)
    if topology.world > 1:
        dist.all_reduce(total)
    return float(total)


def check_share(row: Mapping[str, Any]) -> None:
    """Raises UserError where more FLOPs were counted than the device can do: one of the two figures is wrong."""
    if row["mfu"] is not None and row["mfu"] > 1:
        raise UserError(
            f"MFU at {row['sequence_length']} tokens is {row['mfu']:.0%}, and no device does more than its peak:"
            " correct --report.peak-tflops, or report the device that was taken for another"
        )
    if row["matrix_share"] is not None and row["matrix_share"] > 1:
        raise UserError(
            f"steps at {row['sequence_length']} tokens reach {row['matrix_share']:.0%} of the rate of matrix products:"
            " something else ran while that was measured: measure again on an idle machine"
        )


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
    for key in ("seconds", "seconds_per_token", "tok_s", "mfu", "matrix_flops", "matrix_share", "peak_memory"):
        values = [run[key] for run in runs]
        row[key] = None if None in values else statistics.median(values)
    return row


def render(result: dict[str, Any]) -> str:
    """The results as a table under the machine and the versions."""
    device = result["machine"]["device"]
    used = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    lines = [f"{result['recipe']} on {result['machine']['ranks']} x {device['name']}; {used}"]
    on_cpu = device["kind"] == "cpu"
    share = "matmul" if on_cpu else "MFU"
    lines.append(f"{'tokens':>10} {'s/step':>9} {'tok/s':>10} {'us/token':>9} {'ratio':>6} {share:>6} {'GiB':>7}")
    for row in result["rows"]:
        found = row["matrix_share"] if on_cpu else row["mfu"]
        lines.append(
            f"{row['sequence_length']:>10} {row['seconds']:>9.3f} {row['tok_s']:>10.0f}"
            f" {1e6 * row['seconds_per_token']:>9.2f} {row['time_per_token_ratio']:>6.2f}"
            f" {'n/a' if found is None else f'{found:.1%}':>6} {row['peak_memory'] / 2**30:>7.2f}"
        )
    if on_cpu:
        rate, dtype = result["rows"][0]["matrix_flops"] / 1e9, result["rows"][0]["dtype"]
        lines.append(f"matmul: model FLOPs as a share of {rate:.1f} GFLOP/s, {dtype} matrix products of {MATRIX} here")
    return "\n".join(lines)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own flags, wherever they stand, and the others."""
    return split_flags(words, ("ranks", "bench-steps", "repeats", "json"), numbers="lengths")
