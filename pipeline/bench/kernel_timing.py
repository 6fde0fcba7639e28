"""How `bench kernels` takes its times: all contenders in turn, and medians of what they took."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipeline.bench.kernel_memory import empty_cache

SAMPLE = 0.005
"""Seconds of a sample at least; a shorter pass is run several times in a row."""
BUDGET = 4.0
"""Seconds that the samples of one contender may take; a slow one gets fewer of them, but three."""


def sample(
    contenders: Mapping[str, tuple[Callable[[], object], list[float]]],
    repeats: int,
    device: torch.device,
    drop: Callable[[str, Exception], bool],
) -> set[str]:
    """Appends seconds per call to each contender's list: `repeats` rounds, all contenders in turn.

    Returns the names of those that failed and that ``drop``, asked with the name and the error, left out of the rest.
    """
    plans: dict[str, tuple[int, float]] = {}
    failed: set[str] = set()

    def attempt(name: str, calls: int) -> float | None:
        try:
            return timed(contenders[name][0], calls, device)
        except Exception as error:
            if not drop(name, error):
                raise
        failed.add(name)
        empty_cache(device)
        return None

    for name in contenders:
        if attempt(name, 1) is not None and (seconds := attempt(name, 1)) is not None:
            plans[name] = (max(1, math.ceil(SAMPLE / max(seconds, 1e-7))), max(3, BUDGET / max(seconds, SAMPLE)))
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for index in range(repeats):
            for name, (calls, most) in plans.items():
                if index < most and name not in failed and (seconds := attempt(name, calls)) is not None:
                    contenders[name][1].append(seconds)
    finally:
        if enabled:
            gc.enable()
    return failed


def timed(work: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds per call."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3 / calls
    begun = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - begun) / calls


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """The median, the 20 % and 80 % quantiles and the best of samples."""
    ordered = sorted(samples)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = ordered[math.floor(place)]
        return low + (ordered[math.ceil(place)] - low) * (place - math.floor(place))

    return {
        "seconds": statistics.median(ordered), "low": quantile(0.2), "high": quantile(0.8), "best": ordered[0],
        "samples": len(ordered),
    }  # fmt: skip
