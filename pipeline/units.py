"""Numbers as a person reads them: a few digits and a unit; and the largest one that is taken. Standard library only."""

from __future__ import annotations

LARGEST = 2**31 - 1
"""Of what is counted or sized: more is a slip, and overflows where it is used."""


def human_count(value: float) -> str:
    """1234567 as 1.23M: three digits, in powers of 1000."""
    for unit in ("", "K", "M", "G"):
        if abs(value) < 999.5:  # what rounds to 1000 belongs to the next unit
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def human_bytes(size: float) -> str:
    """1536 as 1.5 KiB: the unit, in powers of 1024, that leaves one to four digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
