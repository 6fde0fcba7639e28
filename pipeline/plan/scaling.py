"""How long a number of tokens takes on one device and on eight, beside what others have stated for the same model."""

from __future__ import annotations

import re

from pipeline.capabilities import Published, PublishedHours
from pipeline.config import RunConfig
from pipeline.errors import UserError, shown
from pipeline.host.devices import Device, find_device
from pipeline.plan.estimate import Plan
from pipeline.system import create_system

UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
DEVICES = (1, 8)
"""Numbers of devices that are compared."""


def token_counts(words: str) -> dict[str, int]:
    """The numbers of tokens in `1B,10B,3T`, by how they are spelt. Raises UserError."""
    counts = {}
    for word in words.split(","):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", word.strip())
        if match is None or float(match[1]) <= 0:
            raise UserError(f"--tokens {shown(words)}: give numbers of tokens above 0, such as 1B or 1B,10B,3T")
        counts[word.strip()] = round(float(match[1]) * UNITS[match[2]])
    return counts


def render_scaling(config: RunConfig, plan: Plan, utilisation: float, tokens: str) -> list[str]:
    """The table as lines: hours here, the least that are possible, and where others have stated some, theirs with the
    share of the peak that they take. Raises UserError as `token_counts` does.

    Devices are taken to share the work without loss: what communication costs is not estimated.
    """
    system = create_system(config)
    published = system.published_hours() if isinstance(system, Published) else None
    # As the plan has it: float32 where the run computes in it.
    peak = plan.tok_s * plan.flops_per_token / (utilisation * plan.ranks)
    head = ["tokens", "devices", f"{utilisation:.0%} of the peak", "least possible"]
    head += [f"published for {published.device}", "share of its peak"] if published else []
    rows = [head]
    for spelling, count in token_counts(tokens).items():
        for devices in DEVICES:
            least = count * plan.flops_per_token / (devices * peak) / 3600
            row = [spelling, str(devices), duration(least / utilisation), duration(least)]
            rows.append(row + (_published(published, count, devices, plan.flops_per_token) if published else []))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [f"scaling on {plan.device.name}, where devices share the work without loss"]
    lines += ["  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return lines


def _published(published: PublishedHours, tokens: int, devices: int, flops_per_token: float) -> list[str]:
    hours, device = published.hours.get((tokens, devices)), find_device(published.device)
    if hours is None or device is None:
        return ["-", "-"]
    share = needed_share(tokens, hours, devices, device, flops_per_token)
    return [duration(hours), f"{share:.0%}" + (": not possible" if share > 1 else "")]


def needed_share(tokens: int, hours: float, devices: int, device: Device, flops_per_token: float) -> float:
    """Share of the devices' peak in half precision that so many tokens in so many hours take."""
    return tokens * flops_per_token / (hours * 3600 * devices * device.tflops * 1e12)


def duration(hours: float) -> str:
    """Hours as a person would say them."""
    for unit, size, least in (("years", 365.25 * 24, 365.25 * 24), ("days", 24.0, 72.0), ("h", 1.0, 1.0)):
        if hours >= least:
            return f"{hours / size:.1f} {unit}"
    return f"{hours * 60:.0f} min"
