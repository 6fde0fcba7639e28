"""trainable.safetensors: what a run trains, whole and by name, to evaluate or to begin another run from."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.checkpoint.manifest import MANIFEST, problems
from pipeline.errors import UserError, shown
from pipeline.parallel.collectives import broadcast_object, shared_errors
from pipeline.parallel.topology import Topology
from pipeline.parallel.weight_files import file_tensors, open_safetensors
from pipeline.parallel.weights import gathered, is_sharded, load_safetensors

TRAINABLE = "trainable.safetensors"
AVERAGE = "average.safetensors"
"""The moving average of what the phase trains (`pipeline/checkpoint/average.py`), of a run that has one."""


def trainable_content(model: nn.Module, names: Iterable[str], topology: Topology) -> tuple[dict[str, Tensor], bool]:
    """The named parameters, whole, as the model computes with them, and its persistent buffers; and whether all of it
    is in copies. On rank 0; the others get nothing. Collective.

    Parameters of ZeRO-3 are gathered one at a time and copied to host memory; those of other stages are the model's
    own, which the next update changes. Buffers are always copies: the next forward pass may change them.
    """
    parameters, main = dict(model.named_parameters()), topology.rank == 0
    found, copied = {}, True
    for name in names:
        parameter = parameters[name]
        if not is_sharded(parameter):
            copied = False
            found[name] = parameter.detach().contiguous()
            continue
        with torch.no_grad(), gathered([parameter]):
            if main:
                found[name] = parameter.detach().to("cpu", copy=True).contiguous()
    if not main:
        return {}, True
    for name, buffer in persistent_buffers(model).items():
        found[name] = buffer.detach().to("cpu", copy=True).contiguous()
    return found, copied


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a model's `state_dict`, such as moving averages, by name: the model's own tensors.

    They are whole on every rank at any ZeRO stage.
    """
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in kept}


def has_trainable(checkpoint: Path, topology: Topology) -> bool:
    """Whether rank 0 sees trained weights in a folder. Collective."""
    return broadcast_object(topology, (checkpoint / TRAINABLE).is_file())


def trainable_names(checkpoint: Path, topology: Topology) -> frozenset[str]:
    """The trained weights in a checkpoint by name, as rank 0 sees them; none where it holds no such file. Collective;
    raises UserError on every rank."""
    path, found = checkpoint / TRAINABLE, frozenset[str]()
    with shared_errors(topology):
        if topology.rank == 0 and path.is_file():
            found = frozenset(file_tensors(path))
    return broadcast_object(topology, found)


def load_trainable(model: nn.Module, checkpoint: Path, topology: Topology, only: Collection[str] | None = None) -> None:
    """Fills the parameters that a checkpoint trained, and the persistent buffers that it holds. Collective.

    `only`: the parameters of these names, each of which it must hold, and no buffer.
    Raises UserError on every rank, before anything is filled, when a tensor is not the model's or is of another shape
    or kind. Buffers that the checkpoint lacks stay as they are: one of an older version holds none.
    """
    path = checkpoint / TRAINABLE
    parameters = {name for name, _ in model.named_parameters()}
    buffers = persistent_buffers(model)
    with shared_errors(topology):
        if not path.is_file():
            raise UserError(f"{checkpoint}: no {TRAINABLE} there: give the folder of a checkpoint")
        if topology.rank == 0 and (checkpoint / MANIFEST).is_file():
            wrong = problems(checkpoint, hashes=True, only=(TRAINABLE,))
            if wrong:
                raise UserError(f"{wrong[0]}: restore the file, or give another checkpoint")
        names = list(file_tensors(path))
        unknown = [name for name in names if name not in parameters and name not in buffers]
        if unknown:
            raise UserError(
                f"{path}: {shown(unknown[0])} is no parameter of this model: is it a checkpoint of another one?"
            )
        values = {}
        if only is None:
            values = _read_buffers(path, {name: buffers[name] for name in names if name not in parameters})
    rename = {name: name for name in (names if only is None else sorted(only)) if name in parameters}
    load_safetensors(model, functools.partial(file_tensors, path), rename, topology, what=str(path))
    with torch.no_grad():
        for name, value in values.items():
            buffers[name].copy_(value)


def load_average(model: nn.Module, checkpoint: Path, topology: Topology) -> None:
    """Fills the parameters of which a checkpoint has a moving average with it; none where it has no such file.
    Collective; raises UserError on every rank, before anything is filled."""
    path = checkpoint / AVERAGE
    if not broadcast_object(topology, path.is_file()):
        return
    with shared_errors(topology):
        if topology.rank == 0 and (checkpoint / MANIFEST).is_file():
            wrong = problems(checkpoint, hashes=True, only=(AVERAGE,))
            if wrong:
                raise UserError(f"{wrong[0]}: restore the file, or give another checkpoint")
        names = list(file_tensors(path))
        known = {name for name, _ in model.named_parameters()}
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            raise UserError(f"{path}: {shown(unknown)} is no parameter of this model: is it of another one?")
    rename = {name: name for name in names}
    load_safetensors(model, functools.partial(file_tensors, path), rename, topology, what=str(path))


def _read_buffers(path: Path, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file has for these buffers, each of which it has. Raises UserError for another shape or kind."""
    values = {}
    with open_safetensors(path) as handle:
        for name, buffer in buffers.items():
            value = values[name] = handle.get_tensor(name)
            if value.shape != buffer.shape:
                raise UserError(
                    f"{path}: {shown(name)} is {tuple(value.shape)}, the model wants {tuple(buffer.shape)}: another"
                    " model, or other sizes?"
                )
            # The precision may be another one, as it may for parameters; a count is no average.
            both_floating = value.is_floating_point() and buffer.is_floating_point()
            if value.dtype != buffer.dtype and not both_floating:
                raise UserError(
                    f"{path}: {shown(name)} is {value.dtype}, the model wants {buffer.dtype}: is it a checkpoint of"
                    " another one?"
                )
    return values
