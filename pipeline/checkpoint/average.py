"""The moving average of the weights that a phase trains (`--optimizer.ema-decay`), and its file in a checkpoint.

It is in float32, of the float32 weights that the optimizer updates, and lies beside them: each rank has the average of
its own part, at any ZeRO stage. In the file every parameter is whole, under its name, so that it is resumed on other
ranks and stages too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoint.files import Entry, write_tensors
from pipeline.checkpoint.masters import Flat, flats, set_master, whole_master
from pipeline.checkpoint.trainable import AVERAGE
from pipeline.errors import UserError, shown
from pipeline.parallel.collectives import shared_errors
from pipeline.parallel.topology import Topology
from pipeline.parallel.weight_files import open_safetensors
from pipeline.parallel.weights import full_shape, gathered, is_sharded
from pipeline.runtime.stop import Stopped

UPDATES = "updates"
"""Where the file says how many updates the average has seen."""


class Average:
    """After each update: average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) and n the
    updates before it.

    The low decay at the start (as in TensorFlow's ExponentialMovingAverage) lets go of the weights that a phase begins
    with. A phase has an average of its own: what the one before it trained, and it does not, stays as it was trained.
    """

    def __init__(self, optimizer: Any, module: nn.Module, decay: float) -> None:
        """Begins with the weights as they are. Raises UserError for an optimizer whose weights are out of reach."""
        self.decay, self.updates = decay, 0
        self._optimizer, self._module = optimizer, module
        try:
            self._values = [master.float().clone() for master in self._masters()]
        except UserError as error:
            raise UserError(f"--optimizer.ema-decay {decay:g}: an average is resumed by name, and {error}") from error

    def _masters(self) -> list[Tensor]:
        return [flat.master.detach() for flat in flats(self._optimizer)]

    @torch.no_grad()
    def update(self) -> None:
        """After an update of the weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._values, self._masters(), 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def restart(self) -> None:
        """Begins anew with the weights as they are."""
        self.updates = 0
        torch._foreach_copy_(self._values, self._masters())

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the average, rounded to its precision, and afterwards with the very weights that it
        had. Collective. Nothing may be saved meanwhile.

        A stop, which all ranks come to at the same place, puts the weights back as well. Any other error ends the run,
        and what the ranks would do together then, not all of them would.
        """
        self._exchange()
        self._fill()
        try:
            yield
        except Stopped:
            self._exchange()
            self._fill()
            raise
        self._exchange()
        self._fill()

    def content(self, topology: Topology) -> dict[str, Tensor]:
        """The average by name, whole, in host memory, on rank 0; the others get nothing. Collective."""
        found = {}
        with self._exchanged():
            for name, (flat, parameter) in self._named().items():
                whole = whole_master(flat, parameter)
                if topology.rank == 0:
                    found[name] = whole.to("cpu", copy=True).contiguous()
        return found

    def write(self, content: dict[str, Tensor], path: Path) -> Entry:
        """Writes what `content` has given."""
        return write_tensors(content, path, {UPDATES: str(self.updates)})

    def load(self, checkpoint: Path, topology: Topology) -> None:
        """Takes the average of a checkpoint of the phase, of whatever ranks and stage. Collective; raises UserError on
        every rank, before anything is changed."""
        path, named = checkpoint / AVERAGE, self._named()
        with shared_errors(topology), open_safetensors(path) as handle:
            updates = (handle.metadata() or {}).get(UPDATES, "")
            if not updates.isdecimal():
                raise UserError(f"{path}: does not say how many updates it has seen: give another checkpoint")
            held = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
            wanted = {name: tuple(full_shape(parameter)) for name, (_, parameter) in named.items()}
            for name in sorted({*held, *wanted}):
                if held.get(name) != wanted.get(name):
                    raise UserError(
                        f"{path}: {shown(name)} is {held.get(name, 'absent')}, this run trains"
                        f" {wanted.get(name, 'none of that name')}: resume the same model and phase"
                    )
        with self._exchanged(), torch.no_grad(), open_safetensors(path) as handle:
            for name, (flat, parameter) in named.items():
                set_master(flat, parameter, handle.get_tensor(name).float())
        self.updates = int(updates)

    def _named(self) -> dict[str, tuple[Flat, nn.Parameter]]:
        """The trained parameters that have elements, in the model's order, and the flat tensor that each is in."""
        holders = {id(parameter): flat for flat in flats(self._optimizer) for parameter in flat.parameters}
        return {
            name: (holders[id(parameter)], parameter)
            for name, parameter in self._module.named_parameters()
            if id(parameter) in holders and full_shape(parameter).numel()
        }

    @torch.no_grad()
    def _exchange(self) -> None:
        """Puts the average where the optimizer has the weights, and the weights where the average was, to the bit."""
        for value, master in zip(self._values, self._masters(), strict=True):
            held = master.clone()
            master.copy_(value)
            value.copy_(held)

    @contextlib.contextmanager
    def _exchanged(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _fill(self) -> None:
        """Makes the model's weights what the optimizer's are, rounded, as after an update. Collective."""
        for flat, parameter in self._named().values():
            if flat.master is parameter:
                continue
            whole = whole_master(flat, parameter)
            with gathered([parameter], modify=True):
                # Of a sharded parameter what rank 0 writes is scattered.
                if not is_sharded(parameter) or torch.distributed.get_rank() == 0:
                    parameter.data.copy_(whole)
