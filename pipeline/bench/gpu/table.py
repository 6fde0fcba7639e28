"""Results in words: a line while the stages run, and the table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]


def line(result: Result, *, earlier: bool) -> str:
    """The line of one step; ``earlier``: its result is that of an earlier run."""
    reason = f": {result['reason']}" if result["reason"] else ""
    when = "earlier" if earlier else f"{result['seconds']:.1f} s"
    return f"  {result['stage']:<8} {result['step']:<28} {result['status']} ({when}){reason}"


def render(results: Sequence[Result]) -> str:
    """Every step with what it found, short enough to read at a glance."""
    rows = [("stage", "step", "result", "seconds", "found")]
    rows += [
        (r["stage"], r["step"], r["status"], f"{r['seconds']:.0f}", r["reason"] or "; ".join(headline(r)))
        for r in results
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    ]
    return "\n".join(text.rstrip() for text in lines)


def headline(result: Result) -> list[str]:
    """The figures of a step that a person wants first. Every shape of figures is one that a step writes."""
    figures = result["figures"]
    if "passed" in figures:
        counts = [f"{figures[kind]} {kind}" for kind in ("passed", "failed", "skipped") if figures[kind]]
        return counts + [f"{name} {value}" for name, value in figures["properties"].items()]
    if "copy" in figures:
        return [
            f"copy {figures['copy'] / 1e12:.2f} TB/s", f"cached {figures['cached_copy'] / 1e12:.2f} TB/s",
            f"bf16 {figures['bf16'] / 1e12:.0f} TFLOP/s", f"TF32 {figures['tf32'] / 1e12:.0f} TFLOP/s",
        ]  # fmt: skip
    if "loss_difference" in figures:
        return [
            f"loss differs by {figures['loss_difference']:.1e}",
            f"gradient norm by {figures['grad_norm_difference']:.1e}",
        ]
    if "kernels" in figures and "checks" in figures["kernels"]:
        checks = [check for check in figures["kernels"]["checks"] if check["error"] is not None]
        return [f"largest error {max(check['error'] for check in checks):.1e} in {len(checks)} cases"] if checks else []
    if "measured_ms" in figures:
        return [
            _compared("all kernels of the op", figures["measured_ms"], figures["predicted_ms"]),
            f"around it {figures['other_ms']:.2f} ms",
        ]
    if "val" in figures:
        shares = {key: value for key, value in figures["val"].items() if key.endswith("recall")}
        return [f"{key.replace('/', ' ').replace('_', ' ')} {value:.1%}" for key, value in shares.items()]
    return [_bench_row(row) for row in figures.get("rows", [])]


def _compared(what: str, measured: float, predicted: float | None) -> str:
    return f"{what} {measured:.2f} ms" + ("" if predicted is None else f", predicted {predicted:.2f} ms")


def _bench_row(row: Mapping[str, Any]) -> str:
    if "tok_s" in row:
        mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
        planned = row.get("planned_memory")
        beside = "" if planned is None else f" (planned {planned / 2**30:.1f})"
        return f"{row['tok_s']:,.0f} tok/s, MFU {mfu}, {row['peak_memory'] / 2**30:.1f} GiB{beside}"
    known = row["roof"] is not None and row["byte_s"] is not None
    share = f" ({row['byte_s'] / 1e9:,.0f} GB/s, {row['roof']:.0%} of the roof)" if known else ""
    return f"{row['pass']} {1e3 * row['seconds']:.2f} ms, {row['us_per_token']:.3f} us per token{share}"
