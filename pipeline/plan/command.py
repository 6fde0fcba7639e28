"""The command `plan`: one run as a table, or every device in one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.capabilities import CountsParts, StatesParameters
from pipeline.commands.flags import parse_flags, parse_run, split_flags
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.host.devices import DEVICES, GIB
from pipeline.plan.advice import MOST_ROWS, Way, largest_batch, ways_to_fit
from pipeline.plan.estimate import Plan, PlanOptions, make_plan
from pipeline.plan.scaling import render_scaling
from pipeline.plan.zero import Counts, PhaseCounts
from pipeline.system import create_system

OWN = ("ranks", "device", "utilisation", "reserve", "tokens")


@dataclass(frozen=True)
class CommandOptions(PlanOptions):
    """What the run is planned for; before the recipe's own flags."""

    all_devices: bool = False
    """A table of what fits on every device that is known."""
    tokens: str | None = None
    """Numbers of tokens, such as 1B,10B,3T: a table of the time that they take on one device and on eight."""


def run_plan(words: Sequence[str]) -> None:
    """The command: `plan RECIPE [--ranks N] [--device NAME | --all-devices] [--utilisation X] [--reserve GIB]
    [--tokens N,...] [flags of the recipe]`."""
    switches = [word for word in words if word == "--all-devices"]
    own, rest = split_flags([word for word in words if word not in switches], OWN)
    options: CommandOptions = parse_flags(CommandOptions(), [*own, *switches], "mnemos plan")
    config = parse_run(rest, "plan", options, options.ranks)
    if options.tokens is not None and options.all_devices:
        raise UserError("--tokens and --all-devices are both given: a table of times is of one device: leave one out")
    print(render_devices(config, options, rest) if options.all_devices else render(config, options, options.tokens))


def render(config: RunConfig, options: PlanOptions, tokens: str | None = None) -> str:
    """One plan as a table, what would make it fit, and how long `tokens` take."""
    plan = make_plan(config, options)
    largest = largest_batch(config, options, plan.counts)
    most = "or more" if largest == MOST_ROWS else ""
    device, counts = plan.device, plan.counts
    rows = [
        ("parameters", f"{counts.parameters:,}"),
        *((f"  {name}", f"{number:,}") for name, number in _parts(config).items()),
        ("trainable", f"{counts.trainable:,} ({counts.trainable / counts.parameters:.1%})"),
        *(_phase_row(config, counts, entry) for entry in counts.phases if len(counts.phases) > 1),
        *((name, _gib(size)) for name, size in plan.held.items()),
        (
            "memory per device",
            f"{_gib(plan.memory)} (estimate) of {_gib(device.memory)}, {_gib(plan.reserve)} in reserve",
        ),
        ("largest --batch-size", f"{largest} {most}".strip() if largest else "none: not even one sequence fits"),
        ("model FLOPs per token", f"{plan.flops_per_token / 1e9:.3f} G"),
        ("tokens per step", f"{plan.tokens_per_step:,}"),
        ("tokens in all", f"{plan.tokens_per_step * plan.steps:,}"),
        ("tokens/s, all devices", f"{plan.tok_s:,.0f} at {options.utilisation:.0%} of the peak"),
        ("hours", f"{plan.hours:,.1f} for {plan.steps:,} steps"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{config.recipe} on {options.ranks} x {device.name}, {config.zero}, sequence {config.parallel.sequence}"]
    lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    if not plan.fits:
        lines += _advice(plan, options, ways_to_fit(config, options, counts))
    if tokens is not None:
        lines += render_scaling(config, plan, options.utilisation, tokens)
    return "\n".join(lines)


def _parts(config: RunConfig) -> Mapping[str, int]:
    """Parameters by what they are for, where the system says it of several parts."""
    system = create_system(config)
    parts = system.parameter_parts() if isinstance(system, CountsParts) else {}
    return parts if len(parts) > 1 else {}


def _phase_row(config: RunConfig, counts: Counts, entry: PhaseCounts) -> tuple[str, str]:
    """What is built in a phase, which is the whole model, and trained; and what others state of it, where they do."""
    system = create_system(config)
    stated = system.published_parameters(entry.phase) if isinstance(system, StatesParameters) else None
    also = "" if stated is None else f" (published: {stated:,})"
    built = f"{counts.parameters:,} built{also}, {entry.trainable:,} trained"
    return f"phase {entry.phase.name}", f"{built}, up to {entry.phase.steps:,} steps"


def _advice(plan: Plan, options: PlanOptions, ways: Sequence[Way]) -> list[str]:
    if not ways:
        return [f"does not fit on {plan.device.name}, nor with any other sharding, recomputation or batch size"]
    width = max(len(way.text) for way in ways)
    lines = [f"does not fit on {plan.device.name}; by the same estimate it does with"]
    for way in ways:
        more = "" if way.ranks == options.ranks else f" on {way.ranks} devices"
        lines.append(f"  {way.text:<{width}}  {_gib(way.plan.memory)}{more}, {way.note}")
    return lines


def render_devices(config: RunConfig, options: PlanOptions, words: Sequence[str]) -> str:
    """What fits on every device, with as many of them: a line per device, with the flags that make it fit; they keep
    the global batch where such flags are found. `words` are the recipe and its flags as they were given."""
    counts = make_plan(config, options).counts
    rows = [("device", "GiB", "as given", "largest batch", "planned", "tokens/s", "flags to add")]
    for device in DEVICES:
        if config.precision == "bf16" and not device.has_bf16:
            rows.append((device.name, f"{device.memory / GIB:.1f}", "no", *3 * "-", "--precision fp16"))
            continue
        own = dataclasses.replace(options, device=device.name)
        plan, added = make_plan(config, own, counts), ""
        if not plan.fits:
            way = next((way for way in ways_to_fit(config, own, counts) if way.ranks == options.ranks), None)
            added = "does not fit"
            if way is not None:
                same = way.plan.tokens_per_step == plan.tokens_per_step
                added = way.text if same else f"{way.text}  ({way.note})"
                plan = way.plan
        rows.append((
            device.name, f"{device.memory / GIB:.1f}", "no" if added else "fits",
            str(largest_batch(config, own, counts) or "-"),
            *((f"{plan.memory / GIB:.1f}", f"{plan.tok_s:,.0f}") if plan.fits else ("-", "-")), added,
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligned = ("<", ">", "<", ">", ">", ">", "<")
    lines = [
        f"./launch.sh --num_gpus {options.ranks} {' '.join(words)}: tokens/s at {options.utilisation:.0%} of the peak"
    ]
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
