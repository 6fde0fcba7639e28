"""Reading and filling weights that ZeRO-3 may have sharded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.parallel.agreement import together
from pipeline.parallel.topology import Topology


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], *, modify: bool = False) -> Iterator[None]:
    """Makes parameters whole on every rank; with `modify`, what rank 0 writes is kept and scattered again."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
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


def open_safetensors(path: Path) -> Any:
    """`safe_open`; a UserError names a file that cannot be read."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}): copy or save it again") from None


def load_safetensors(
    model: nn.Module, files: Iterable[Path], rename: Mapping[str, str], topology: Topology, *, what: str
) -> None:
    """Fills parameters from safetensors files; `rename` maps every parameter to fill to its tensor's name. Collective.

    Raises UserError on every rank when a tensor is missing or has another shape on one.
    """
    # Each node reads its own files, and all must be found before the first parameter is gathered.
    where = together(topology, lambda: _locate(model, files, rename, what))

    def read(name: str, _: torch.Size) -> Tensor:
        with safe_open(where[rename[name]], framework="pt") as handle:
            return handle.get_tensor(rename[name])

    fill(model, read, rename)


def _locate(model: nn.Module, files: Iterable[Path], rename: Mapping[str, str], what: str) -> dict[str, Path]:
    where: dict[str, Path] = {}
    for file in files:
        with open_safetensors(file) as handle:
            where.update(dict.fromkeys(handle.keys(), file))
    missing = [tensor for tensor in rename.values() if tensor not in where]
    if missing:
        raise UserError(f"{what}: {len(missing)} tensors are missing, {missing[0]!r} first: another model?")

    parameters = dict(model.named_parameters())
    for name, tensor in rename.items():
        with safe_open(where[tensor], framework="pt") as handle:
            shape = tuple(handle.get_slice(tensor).get_shape())
        if shape != tuple(full_shape(parameters[name])):
            raise UserError(f"{what}: {tensor!r} is {shape}, the model wants {tuple(full_shape(parameters[name]))}")
    return where
