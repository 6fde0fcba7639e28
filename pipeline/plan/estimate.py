"""The plan of a run: parameters exactly, the rest by formula."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import RunConfig
from pipeline.ds_config import deepspeed_config
from pipeline.errors import UserError
from pipeline.host.devices import DEVICES, GIB, Device, find_device
from pipeline.load import checked_system, model_without_storage
from pipeline.parallel.topology import Topology, check_degrees
from pipeline.phases import names, pick
from pipeline.plan.zero import Counts, PhaseCounts, zero_bytes
from pipeline.system import Phase

RESERVE = 2 * GIB
RESERVE_SHARE = 0.05
"""Device memory that a plan leaves free: what is the same on every device (the CUDA context, loaded kernels, NCCL's and
cuBLAS's buffers, what the driver keeps), and a share for the allocator's fragments. docs/plan.md derives it."""


@dataclass(frozen=True)
class PlanOptions:
    """What the run is planned for; before the recipe's own flags."""

    ranks: int = 1
    """Devices in all."""
    device: str = "H200"
    """A device of the table in docs/plan.md, or its driver's name."""
    utilisation: float = 0.4
    """Share of the peak that model FLOPs are expected to reach; well-kept trainers reach 0.4 at 64K tokens."""
    reserve: float | None = None
    """GiB of device memory that stay free; None: 2 GiB and 5 % of the device's."""


@dataclass(frozen=True)
class Plan:
    """Bytes are per device."""

    counts: Counts
    held: dict[str, int]
    """Bytes by what they are: weights, gradients, optimizer, ZeRO's buffers, and what the system's step holds."""
    device: Device
    ranks: int
    """Devices in all."""
    reserve: int
    """Bytes of the device that stay free."""
    flops_per_token: float
    tokens_per_step: int
    tok_s: float
    steps: int
    """Over all phases of the run."""
    hours: float

    @property
    def memory(self) -> int:
        """The most that is held at a time, as `torch.cuda.max_memory_allocated` would count it."""
        return sum(self.held.values())

    @property
    def usable_memory(self) -> int:
        """Bytes of the device that the run may hold."""
        return self.device.memory - self.reserve

    @property
    def fits(self) -> bool:
        return self.memory <= self.usable_memory


def make_plan(config: RunConfig, options: PlanOptions, counts: Counts | None = None) -> Plan:
    """Counts parameters exactly (on the meta device) and estimates the rest. Raises UserError.

    `counts`: those of an earlier plan of the same model, which are the slow part.
    """
    device = planned_device(options.device)
    if options.ranks < 1:
        raise UserError(f"--ranks is {options.ranks}: give a number of devices above 0")
    if not 0 < options.utilisation <= 1:
        raise UserError(f"--utilisation is {options.utilisation}: give a share above 0 and up to 1")
    if options.reserve is not None and not 0 <= options.reserve * GIB < device.memory:
        raise UserError(
            f"--reserve is {options.reserve:g}: give GiB from 0 to below the {device.memory / GIB:.1f} of the device"
        )
    if config.precision == "bf16" and not device.has_bf16:
        raise UserError(f"--precision bf16: {device.name} has no bfloat16: give fp16, or auto")
    check_degrees(options.ranks, config.parallel.sequence)
    topology = Topology(world=options.ranks, sequence=config.parallel.sequence)
    system = checked_system(config, topology)
    counts = counts or count_parameters(config)
    element = 2 if config.precision != "fp32" else 4
    stretches: list[tuple[int, Phase | None]] = [(entry.phase.steps, entry.phase) for entry in counts.phases]
    stretches = stretches or [(config.steps, None)]
    steps = sum(count for count, _ in stretches)
    # Of the mean step: phases may train more or less of the model. Of a run that makes none, what one would take.
    shares = [(count / steps if steps else 1 / len(stretches), phase) for count, phase in stretches]
    flops = sum(share * system.flops(config.sequence_length, phase).total for share, phase in shares)
    tokens = config.batch_size * config.grad_accum * topology.data * config.sequence_length
    tflops = device.float32 if element == 4 else device.tflops
    tok_s = options.utilisation * options.ranks * tflops * 1e12 / flops
    reserve = RESERVE + RESERVE_SHARE * device.memory if options.reserve is None else options.reserve * GIB
    return Plan(
        counts=counts,
        held={
            **zero_bytes(
                deepspeed_config(config),
                counts,
                ranks=options.ranks,
                element=element,
                averaged=config.optimizer.ema_decay > 0,
            ),
            **system.activation_bytes(topology, element, device),
        },
        device=device,
        ranks=options.ranks,
        reserve=int(reserve),
        flops_per_token=flops,
        tokens_per_step=tokens,
        tok_s=tok_s,
        steps=steps,
        hours=steps * tokens / tok_s / 3600,
    )


def planned_device(name: str) -> Device:
    """The device that --device means. Raises UserError."""
    device = find_device(name)
    if device is None:
        raise UserError(f"--device {name}: not in the table; known: {', '.join(device.name for device in DEVICES)}")
    return device


def count_parameters(config: RunConfig) -> Counts:
    """Of the whole model, built without storage."""
    loaded = model_without_storage(config)
    sizes = {name: parameter.numel() for name, parameter in loaded.model.named_parameters()}
    trained = frozenset().union(*(names(phase) for phase in loaded.phases))
    phases = tuple(
        PhaseCounts(phase, sum(sizes[name] for name in names(phase)))
        for phase in pick(loaded.system.config, loaded.phases)
        if config.phase in (None, phase.name)
    )
    return Counts(sum(sizes.values()), sum(sizes[name] for name in trained), max(sizes.values()), phases)
