"""Measurements: JSON and a table, each with the machine and the versions."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from pipeline.errors import UserError
from pipeline.spelling import did_you_mean, nearest

BENCHES = {
    "throughput": ("pipeline.bench.throughput", "run_throughput"),
    "throughput-case": ("pipeline.bench.throughput", "run_case"),
    "dense": ("pipeline.bench.dense", "run_dense"),
    "dense-case": ("pipeline.bench.dense_case", "run_case"),
    "kernels": ("pipeline.bench.kernels", "run_kernels"),
    "decode": ("pipeline.bench.decode", "run_decode"),
    "resume": ("pipeline.bench.resume", "run_resume"),
    "report": ("pipeline.bench.gpu.report", "run_report"),
    "resume-case": ("pipeline.bench.resume", "run_case"),
    "kernels-case": ("pipeline.bench.kernel_memory", "run_case"),
}
"""Where each bench is; a case is a part of one, in a process of its own."""


def run_bench(words: Sequence[str]) -> None:
    """The command: `bench NAME`."""
    if not words or words[0] not in BENCHES:
        names = [name for name in BENCHES if not name.endswith("-case")]
        got = words[0] if words else "none"
        meant = did_you_mean(nearest(got, names))
        raise UserError(f"bench needs the name of a bench, one of {', '.join(names)} (got {got!r}{meant})")
    module, function = BENCHES[words[0]]
    getattr(importlib.import_module(module), function)(words[1:])
