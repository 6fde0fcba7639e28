"""The float32 weights that DeepSpeed's optimizers update: where each rank has its part of them, and whole by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.parallel.weights import full_shape, is_sharded


@dataclass(frozen=True)
class Flat:
    """A tensor that torch's optimizer updates, and the parameters whose float32 values it holds (a part of)."""

    parameters: Sequence[nn.Parameter]
    master: Tensor
    optimizer: torch.optim.Optimizer

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is all of one parameter, on every rank: without ZeRO."""
        first = self.parameters[0]
        alone = len(self.parameters) == 1 and self.master.shape == first.shape
        return alone and not hasattr(first, "_hp_mapping") and not is_sharded(first)


def flats(optimizer: Any) -> Iterator[Flat]:
    """What an optimizer of the engine updates. Raises UserError for one whose float32 weights are out of reach."""
    if isinstance(optimizer, torch.optim.Optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield Flat([parameter], parameter, optimizer)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):  # half precision without ZeRO
        for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(parameters, masters, strict=True):
                yield Flat([parameter], master, optimizer.optimizer)
    elif isinstance(optimizer, BF16_Optimizer):  # ZeRO-1 that adds gradients up in float32
        for parameters, master in zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True):
            yield Flat(parameters, master, optimizer.optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        for parameters, master in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            yield Flat(parameters, master, optimizer.optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        if optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
            raise UserError("a universal checkpoint cannot be loaded into an NVMe offload: choose --zero zero3_offload")
        if optimizer.offload_optimizer and set(optimizer.subgroup_to_device.values()) != {"cpu"}:
            raise UserError("a universal checkpoint cannot be loaded with offload_optimizer.ratio below 1: set it to 1")
        for parameters, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            yield Flat(parameters, master, optimizer.optimizer)
    else:
        raise UserError(
            f"a universal checkpoint cannot be loaded into {type(optimizer).__name__}: choose another --zero"
        )


def whole_master(flat: Flat, parameter: nn.Parameter) -> Tensor:
    """The float32 values of a parameter of a flat tensor, whole and to the bit, on every rank. Collective unless the
    tensor is whole."""
    if flat.is_whole:
        return flat.master.detach()
    holder: Any = parameter
    shape = full_shape(parameter)
    if is_sharded(parameter):
        # DeepSpeed's own function takes no parameter whose size the ranks do not divide.
        local = safe_get_local_fp32_param(parameter).detach().reshape(-1)
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(holder.ds_process_group))]
        dist.all_gather(parts, local, group=holder.ds_process_group)
        return torch.cat(parts)[: shape.numel()].reshape(shape)
    whole = torch.zeros(shape.numel(), dtype=torch.float32, device=parameter.device)
    if holder._hp_mapping is not None:
        place = holder._hp_mapping.lp_fragment_address
        whole[place.start : place.start + place.numel] = holder._hp_mapping.get_hp_fragment().detach()
    # One rank has each value and the others zero: a sum of whole numbers leaves its bits, that of -0.0 too.
    dist.all_reduce(whole.view(torch.int32), group=holder._dp_group)
    return whole.reshape(shape)


def set_master(flat: Flat, parameter: nn.Parameter, value: Tensor) -> None:
    """Writes the part of a parameter's float32 values that this rank has. The model's own weights stay as they are,
    where they are others."""
    if is_sharded(parameter):
        safe_set_local_fp32_param(parameter, part_of(value, parameter))
    elif flat.is_whole:
        flat.master.copy_(value)
    else:
        safe_set_full_fp32_param(parameter, value)


def part_of(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's part of a value, padded with zeros as ZeRO-3 pads."""
    holder: Any = parameter
    size, rank = holder.partition_numel(), holder.ds_zero_partition_rank
    part = torch.zeros(size, dtype=torch.float32)
    local = value.reshape(-1)[rank * size : (rank + 1) * size]
    part[: local.numel()] = local
    return part
