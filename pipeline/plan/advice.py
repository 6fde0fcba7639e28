"""What fits a device: the largest batch, and what makes a run fit that does not, all by the plan's own estimate."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config import RunConfig, replace
from pipeline.errors import UserError
from pipeline.plan.estimate import Plan, PlanOptions, make_plan
from pipeline.plan.zero import Counts

MOST_ROWS = 2**16
"""No larger batch is looked for; a power of two."""
MOST_RANKS = 64
"""Nor more devices for a sequence."""
ZERO = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
"""In the order in which they cost more time."""

Changes = dict[str, object]
"""What `pipeline.config.replace` takes."""


@dataclass(frozen=True)
class Way:
    """A change with which a run fits."""

    config: RunConfig
    ranks: int
    plan: Plan
    flags: dict[str, str]
    """The flags for it, without dashes, and their values; "" for a flag that is a switch."""
    note: str
    """What becomes of the global batch."""

    @property
    def text(self) -> str:
        """The flags as they are typed."""
        return " ".join(f"--{name} {value}".rstrip() for name, value in self.flags.items())


def largest_batch(config: RunConfig, options: PlanOptions, counts: Counts) -> int:
    """The largest --batch-size that fits with these ranks and flags; 0 where not even one sequence does."""

    def fits(rows: int) -> bool:
        return make_plan(replace(config, batch_size=rows), options, counts).fits

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        if high == MOST_ROWS:
            return high
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def ways_to_fit(config: RunConfig, options: PlanOptions, counts: Counts) -> list[Way]:
    """Changes with which a run that does not fit would fit, by the estimate; none changes more than it needs to.

    The same rows per step in smaller micro-batches where that is enough; else other sharding and recomputation, with
    the micro-batches as they are and with one row, those on the fewest devices first. Fewer rows per step are named
    where nothing else fits on as many devices.
    """

    def way(changed: RunConfig, ranks: int = options.ranks, note: str = "the same global batch") -> Way:
        plan = make_plan(changed, dataclasses.replace(options, ranks=ranks), counts)
        return Way(changed, ranks, plan, _flags(config, changed), note)

    smaller = _smaller_micro_batches(config, options, counts)
    if smaller is not None:
        return [way(smaller)]
    bases = [config] if config.batch_size == 1 else [config, _in_rows_of(config, 1)]
    found = [way(*changed) for base in bases for changed in _less_memory(base, options, counts)]
    found.sort(key=lambda way: way.ranks)
    rows = 0 if found and found[0].ranks == options.ranks else largest_batch(config, options, counts)
    if rows:
        found.insert(0, way(replace(config, batch_size=rows), note="a smaller global batch"))
    return found


def _in_rows_of(config: RunConfig, rows: int) -> RunConfig:
    """The same step in micro-batches of so many rows, which divide its own."""
    return replace(config, batch_size=rows, grad_accum=config.batch_size * config.grad_accum // rows)


def _smaller_micro_batches(config: RunConfig, options: PlanOptions, counts: Counts) -> RunConfig | None:
    total = config.batch_size * config.grad_accum
    for rows in range(config.batch_size - 1, 0, -1):
        if total % rows == 0 and make_plan(_in_rows_of(config, rows), options, counts).fits:
            return _in_rows_of(config, rows)
    return None


def _less_memory(config: RunConfig, options: PlanOptions, counts: Counts) -> Iterator[tuple[RunConfig, int]]:
    """Configs and ranks that fit by other sharding and recomputation, none with a part that could be left out."""
    # Of each axis, levels in the order in which they cost more: as it is, then what is not on yet.
    axes: list[list[tuple[Changes, int]]] = [[({}, options.ranks)] for _ in range(3)]
    if not config.activation_checkpointing:
        axes[0].append(({"activation_checkpointing": True}, options.ranks))
    if config.zero in ZERO:
        axes[1] += [({"zero": name}, options.ranks) for name in ZERO[ZERO.index(config.zero) + 1 :]]
    axes[2] += _degrees(config, options)
    levels = itertools.product(*(range(len(axis)) for axis in axes))
    taken: list[tuple[int, ...]] = []
    for chosen in sorted(levels, key=lambda level: sum(map(bool, level))):
        if any(all(a <= b for a, b in zip(other, chosen, strict=True)) for other in taken) or not any(chosen):
            continue
        parts = [axis[level] for axis, level in zip(axes, chosen, strict=True)]
        changed = replace(config, **{name: value for changes, _ in parts for name, value in changes.items()})
        ranks = max(ranks for _, ranks in parts)
        try:
            plan = make_plan(changed, dataclasses.replace(options, ranks=ranks), counts)
        except UserError:
            # Heads or a sequence that cannot be divided so.
            continue
        if plan.fits:
            taken.append(chosen)
            yield changed, ranks


def _degrees(config: RunConfig, options: PlanOptions) -> Iterator[tuple[Changes, int]]:
    """Higher sequence degrees that keep the global batch: over the ranks that there are, with more accumulation, or
    over more ranks."""
    degree, data = config.parallel.sequence, options.ranks // config.parallel.sequence
    while (degree := 2 * degree) <= MOST_RANKS:
        change: Changes = {"parallel__sequence": degree}
        left = options.ranks // degree
        if options.ranks % degree == 0 and data % left == 0:
            yield change | {"grad_accum": config.grad_accum * data // left}, options.ranks
        else:
            yield change, data * degree


def _flags(before: RunConfig, after: RunConfig) -> dict[str, str]:
    """The flags that make one config of another."""
    values = {
        "batch-size": (before.batch_size, after.batch_size),
        "grad-accum": (before.grad_accum, after.grad_accum),
        "parallel.sequence": (before.parallel.sequence, after.parallel.sequence),
        "zero": (before.zero, after.zero),
        "activation-checkpointing": (before.activation_checkpointing, after.activation_checkpointing),
    }
    return {flag: "" if new is True else str(new) for flag, (old, new) in values.items() if new != old}
