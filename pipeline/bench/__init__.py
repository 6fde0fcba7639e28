"""Measurements: JSON and a table, each with the machine and the versions."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import UserError


def run_bench(words: Sequence[str]) -> None:
    """The command: `bench throughput`."""
    from pipeline.bench.throughput import run_case, run_throughput

    benches = {"throughput": run_throughput, "throughput-case": run_case}
    if not words or words[0] not in benches:
        raise UserError(f"bench needs the name of a bench: throughput (got {words[0] if words else 'none'!r})")
    benches[words[0]](words[1:])
