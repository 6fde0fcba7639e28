"""What `bench kernels` found, as tables for a person."""

from __future__ import annotations

import textwrap
from typing import Any

PASSES = ("forward", "forward+backward")

WIDTH = 100
HEAD = (
    f"{'backend':<18} {'pass':<7} {'ms':>9} {'20-80 %':>15} {'us/tok':>7} {'GFLOP/s':>8} {'GB/s':>6} {'roof':>5}"
    f" {'memory':>6} {'error':>8}"
)


def render(result: dict[str, Any]) -> str:
    """The results as tables under the machine and the versions."""
    device = result["machine"]["device"]
    used = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    where = device["name"] if device["kind"] == "cuda" else f"{device['name']}, {result['machine']['threads']} threads"
    lines = textwrap.wrap(f"{where}; {used}", WIDTH)
    ceiling = result["roof"]
    if ceiling["flops"] is not None and ceiling["bandwidth"] is not None:
        lines.append(
            f"roof: {ceiling['flops'] / 1e9:.0f} GFLOP/s, {ceiling['bandwidth'] / 1e9:.1f} GB/s ({ceiling['source']})"
        )
    previous = None
    for row in result["rows"]:
        group = (row["op"], row["shape"], row["dtype"])
        if group != previous:
            lines += ["", f"{row['op']} {row['shape']} {row['dtype']}", HEAD]
            previous = group
        cells = [
            f"{row['backend']:<18} {'fwd' if row['pass'] == PASSES[0] else 'fwd+bwd':<7} {1e3 * row['seconds']:>9.2f}",
            f"{1e3 * row['low']:.2f}-{1e3 * row['high']:.2f}".rjust(15),
            f"{row['us_per_token']:>7.2f}",
            "-".rjust(8) if row["flop_s"] is None else f"{row['flop_s'] / 1e9:>8.1f}",
            "-".rjust(6) if row["byte_s"] is None else f"{row['byte_s'] / 1e9:>6.1f}",
            "-".rjust(5) if row["roof"] is None else f"{row['roof']:>5.0%}",
            "-".rjust(6) if row["memory"] is None else f"{row['memory']:>5.2f}x",
            "-".rjust(8) if row["error"] is None else f"{row['error']:>8.1e}",
        ]
        lines.append(" ".join(cells))
    ran = {row["backend"]: row["implementation"] for row in result["rows"] if row["implementation"]}
    notes = [*(f"{name}: {what}" for name, what in ran.items()), *(f"left out: {note}" for note in result["notes"])]
    lines += [""] * bool(notes) + notes
    return "\n".join(lines)
