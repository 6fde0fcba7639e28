"""Reading and filling weights that ZeRO-3 may have sharded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from pipeline.errors import UserError, shown
from pipeline.parallel.collectives import shared_errors
from pipeline.parallel.topology import Topology
from pipeline.parallel.weight_files import StoredTensor

FLOATING = ("F64", "F32", "F16", "BF16")
"""Types whose values are the weights; those of eight bits or fewer have scales elsewhere."""


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], *, modify: bool = False) -> Iterator[None]:
    """Makes parameters whole on every rank; with `modify`, what rank 0 writes is kept and scattered again."""
    sharded: list[Any] = [parameter for parameter in parameters if is_sharded(parameter)]
    if not modify:
        # ZeRO-3 keeps small parameters whole; DeepSpeed's context would part with them at its end.
        sharded = [parameter for parameter in sharded if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if modify else None, enabled=bool(sharded)):
        yield


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 holds it in parts."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, sharded or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and a parameter's name alone, not on ranks or order."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fill(model: nn.Module, value: Callable[[str, torch.Size], Tensor], names: Iterable[str] | None = None) -> None:
    """Writes `value(name, shape)` into the named parameters (all of them by default), one at a time."""
    wanted = None if names is None else set(names)
    rank = dist.get_rank() if dist.is_initialized() else 0
    for name, parameter in model.named_parameters():
        if wanted is not None and name not in wanted:
            continue
        with torch.no_grad(), gathered([parameter], modify=True):
            if rank == 0 or not is_sharded(parameter):
                parameter.data.copy_(value(name, parameter.shape))


def load_safetensors(
    model: nn.Module,
    find: Callable[[], Mapping[str, StoredTensor]],
    rename: Mapping[str, str],
    topology: Topology,
    *,
    what: str,
) -> None:
    """Fills parameters from safetensors files; `rename` maps every parameter to fill to its tensor's name. Collective.

    `find` says where the tensors are; every rank calls it, since each node reads its own files. Raises UserError on
    every rank, before anything is filled, when one cannot find a tensor, or finds one of another shape or kind.
    """
    with shared_errors(topology):
        stored = _checked(model, find(), rename, what)

    def read(name: str, _: torch.Size) -> Tensor:
        return stored[rename[name]].read(rename[name])

    fill(model, read, rename)


def _checked(
    model: nn.Module, stored: Mapping[str, StoredTensor], rename: Mapping[str, str], what: str
) -> Mapping[str, StoredTensor]:
    missing = [tensor for tensor in rename.values() if tensor not in stored]
    if missing:
        raise UserError(f"{what}: {len(missing)} tensors are missing, {shown(missing[0])} first: another model?")
    parameters = dict(model.named_parameters())
    for name, tensor in rename.items():
        found, wanted = stored[tensor], tuple(full_shape(parameters[name]))
        if found.shape != wanted:
            raise UserError(
                f"{what}: {shown(tensor)} in {found.file.name} is {found.shape}, the model wants {wanted}: another"
                " model, or other sizes?"
            )
        if found.dtype not in FLOATING:
            raise UserError(
                f"{what}: {shown(tensor)} in {found.file.name} is {found.dtype}, the model wants floating-point"
                " weights that are not quantised: give the original ones"
            )
    return stored
