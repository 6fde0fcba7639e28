"""`plan`: memory per device, tokens/s and hours of a run, before anything is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config import RunConfig
from pipeline.ds_config import offload_device
from pipeline.engine import deepspeed_config, zero_stage
from pipeline.errors import UserError
from pipeline.flags import fit_ranks, parse_flags, parse_run, split_flags
from pipeline.hardware import PEAK_TFLOPS
from pipeline.parallel.topology import Topology, check_degrees
from pipeline.system import create_system

MEMORY_GIB = {"A100": 80, "H100": 80, "H200": 141, "B200": 180, "B300": 268, "L40S": 48, "RTX 4090": 24}
"""Usable device memory, for the warning when a plan does not fit."""


@dataclass(frozen=True)
class PlanOptions:
    """What the run is planned for; before the recipe's own flags."""

    ranks: int = 1
    """Devices in all."""
    device: str = "H200"
    """A device with a known peak, see docs/plan.md."""
    utilisation: float = 0.4
    """Share of the peak that model FLOPs are expected to reach; well-kept trainers reach 0.4 at 64K tokens."""


@dataclass(frozen=True)
class Plan:
    """Bytes are per device."""

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    flops_per_token: float
    tokens_per_step: int
    tok_s: float
    hours: float

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def make_plan(config: RunConfig, options: PlanOptions) -> Plan:
    """Counts parameters exactly (on the meta device) and estimates the rest. Raises UserError."""
    if options.device not in PEAK_TFLOPS:
        raise UserError(f"--device {options.device}: its peak is not known; known: {', '.join(sorted(PEAK_TFLOPS))}")
    if options.ranks < 1:
        raise UserError(f"--ranks is {options.ranks}: give a number of devices above 0")
    if not 0 < options.utilisation <= 1:
        raise UserError(f"--utilisation is {options.utilisation}: give a share above 0 and up to 1")
    check_degrees(options.ranks, config.parallel.sequence)
    topology = Topology(world=options.ranks, sequence=config.parallel.sequence)
    system = create_system(config)
    system.check(topology)
    with torch.device("meta"):
        model = system.build()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    trainable = sum({name: sizes[name] for phase in system.phases(model) for group in phase.groups
                     for name in group.parameters}.values())  # fmt: skip
    ds_config = deepspeed_config(config)
    stage = zero_stage(ds_config)
    element = 2 if config.precision != "fp32" else 4

    def held(count: float, since: int, offload: str) -> int:
        if offload_device(ds_config, offload) != "none":
            return 0
        return int(count / options.ranks if stage >= since else count)

    weights = held(element * total, 3, "offload_param")
    gradients = held(4 * trainable, 2, "offload_optimizer")
    # float32 master weights and two moments.
    optimizer = held(12 * trainable, 1, "offload_optimizer")
    flops = system.flops(config.sequence_length).total
    tokens = config.batch_size * config.grad_accum * topology.data * config.sequence_length
    tok_s = options.utilisation * options.ranks * PEAK_TFLOPS[options.device] * 1e12 / flops
    return Plan(
        parameters=total,
        trainable=trainable,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=system.activation_bytes(topology, element),
        flops_per_token=flops,
        tokens_per_step=tokens,
        tok_s=tok_s,
        hours=config.steps * tokens / tok_s / 3600,
    )


def run_plan(words: Sequence[str]) -> None:
    """The command: `plan RECIPE [--ranks N] [--device NAME] [--utilisation X] [recipe flags]`."""
    own, rest = split_flags(words, ("ranks", "device", "utilisation"))
    options: PlanOptions = parse_flags(PlanOptions(), own, "mnemos plan")
    config = fit_ranks(parse_run(rest, "plan"), rest, options.ranks)
    print(render(config, options, make_plan(config, options)))


def render(config: RunConfig, options: PlanOptions, plan: Plan) -> str:
    """The plan as a table."""
    gib = 2.0**30
    rows: list[tuple[str, Any]] = [
        ("parameters", f"{plan.parameters:,}"),
        ("trainable", f"{plan.trainable:,} ({plan.trainable / plan.parameters:.1%})"),
        ("weights", f"{plan.weights / gib:.2f} GiB"),
        ("gradients", f"{plan.gradients / gib:.2f} GiB"),
        ("optimizer", f"{plan.optimizer / gib:.2f} GiB"),
        ("activations", f"{plan.activations / gib:.2f} GiB (estimate)"),
        ("memory per device", f"{plan.memory / gib:.2f} GiB"),
        ("model FLOPs per token", f"{plan.flops_per_token / 1e9:.3f} G"),
        ("tokens per step", f"{plan.tokens_per_step:,}"),
        ("tokens in all", f"{plan.tokens_per_step * config.steps:,}"),
        ("tokens/s, all devices", f"{plan.tok_s:,.0f} at {options.utilisation:.0%} of the peak"),
        ("hours", f"{plan.hours:,.1f} for {config.steps:,} steps"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [
        f"{config.recipe} on {options.ranks} x {options.device}, {config.zero}, sequence {config.parallel.sequence}"
    ]
    lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    room = MEMORY_GIB.get(options.device)
    if room is not None and plan.memory / gib > room:
        lines.append(
            f"does not fit: {options.device} has about {room} GiB; lower --batch-size, raise --parallel.sequence,"
            " or use --zero zero3 and --activation-checkpointing"
        )
    return "\n".join(lines)
