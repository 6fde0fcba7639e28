"""Resuming on other ranks or another ZeRO stage: `convert` one checkpoint, then `load_universal` it anywhere.

The tensors go in by DeepSpeed's tensor-fragment functions. Its own universal loader gives every group of ZeRO-3 the
learning rate and decay of the first, and refuses what was saved with ZeRO-3 at other stages.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from pipeline.checkpoint.masters import Flat, flats, part_of, set_master
from pipeline.checkpoint.safe import load_pickle
from pipeline.checkpoint.universal_convert import (
    COUNTERS,
    LOSS_SCALE,
    MASTER,
    MODEL_STATES,
    MOMENTS,
    PARAMETERS,
    STEP,
    TENSORS,
    convert,
    is_universal,
)
from pipeline.errors import UserError
from pipeline.parallel.collectives import raise_together, shared_errors
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import fill, full_shape, is_sharded

if TYPE_CHECKING:
    from pipeline.engine import Engine

__all__ = ["convert", "is_universal", "load_universal"]


def load_universal(
    engine: Engine,
    checkpoint: Path,
    topology: Topology,
    *,
    fresh: Collection[str] = (),
    dropped: Collection[str] = (),
) -> None:
    """Fills weights, master weights, moments, steps, buffers, counters and loss scale of a fresh engine. Collective.

    Of another phase's checkpoint: `fresh` are the trained parameters that it says nothing of, which stay as they are,
    with moments of zero; `dropped` are those that it trained and this engine does not.

    Hyper-parameters of the groups stay those of the engine. Raises UserError on every rank before anything is changed.
    """
    saved = _Saved(checkpoint)
    # ZeRO has no state of a parameter without elements.
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad and full_shape(p).numel()}
    named = {name: parameter for name, parameter in trained.items() if name not in fresh}
    names = {parameter: name for name, parameter in named.items()}
    with shared_errors(topology):
        saved.check(engine.module, named, dropped)
        known = set(trained.values())
        held = [flat for flat in flats(engine.optimizer) if any(p in known for p in flat.parameters)]
        steps = [saved.step_of([names[p] for p in flat.parameters if p in names]) for flat in held]
    partitions = hasattr(engine.optimizer, "checkpoint_event_prologue")
    if partitions:
        engine.optimizer.checkpoint_event_prologue()
    with torch.no_grad():
        for flat, step in zip(held, steps, strict=True):
            _create_state(flat, step)
            for parameter in (p for p in flat.parameters if p in known):
                if parameter in names:
                    _set(flat, parameter, saved, names[parameter])
                elif is_sharded(parameter):
                    _clear_padding(parameter)
        # The model computes with a rounded copy of the masters, as after an update.
        fill(engine.module, lambda name, shape: saved.read(name, MASTER), named)
        saved.fill_buffers(engine.module)
    if partitions:
        engine.optimizer.checkpoint_event_epilogue()
    for counter in COUNTERS:
        setattr(engine.deepspeed, counter, saved.states[counter])
    # One that was saved in another precision, or by an older version, has none: training begins with the first.
    if engine.loss_scale is not None and saved.states.get(LOSS_SCALE):
        engine.loss_scale.load(saved.states[LOSS_SCALE])
    # The caller may remove the files as soon as this returns: no rank returns before all have read.
    raise_together(topology, None)


class _Saved:
    """A universal checkpoint, read a tensor at a time."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.states: dict[str, Any] = {}

    def read(self, name: str, kind: str) -> Tensor:
        """One of TENSORS, or the step, of a parameter."""
        content = load_pickle(self.checkpoint / PARAMETERS / name / f"{kind}.pt", mmap=kind != STEP)
        return content if kind == STEP else content["param"]

    def check(self, module: nn.Module, named: dict[str, nn.Parameter], dropped: Collection[str]) -> None:
        """Raises UserError unless exactly the parameters `named` are here, in their shapes, and those `dropped`."""
        if not is_universal(self.checkpoint):
            raise UserError(f"{self.checkpoint}: is not in the universal format: convert it first")
        found = {path.name for path in (self.checkpoint / PARAMETERS).iterdir() if path.is_dir()}
        parameters = dict(module.named_parameters())
        empty = {name for name, parameter in parameters.items() if not full_shape(parameter).numel()}
        for name in sorted(found - named.keys() - empty - set(dropped)):
            known = name in parameters
            what = "is frozen in this run" if known else "is no parameter of this model"
            raise UserError(
                f"{self.checkpoint}: {name!r} was trained there and {what}: resume the same model and phase"
            )
        for name in sorted(named.keys() - found):
            raise UserError(
                f"{self.checkpoint}: has no state of {name!r}, which this run trains: resume the same model and phase"
            )
        for name, parameter in named.items():
            for kind in TENSORS:
                shape = tuple(self.read(name, kind).shape)
                if shape != tuple(full_shape(parameter)):
                    raise UserError(
                        f"{self.checkpoint}: {kind} of {name!r} is {shape}, the model wants"
                        f" {tuple(full_shape(parameter))}: resume the same model"
                    )
        self.states = load_pickle(self.checkpoint / MODEL_STATES)

    def step_of(self, names: Sequence[str]) -> float:
        """The updates that the moments of a group have seen. Raises UserError where they differ."""
        # 0: never updated, which stage 0 counts by parameter. Its moments are zero, with which any step does nothing.
        steps = {step: name for name in reversed(names) if (step := float(self.read(name, STEP))) > 0}
        if len(steps) > 1:
            (a, one), (b, other) = sorted(steps.items())[:2]
            raise UserError(
                f"{self.checkpoint}: {one!r} was updated {a:.0f} times and {other!r} {b:.0f} times, but ZeRO counts"
                " once for their group: resume with --zero zero0"
            )
        return next(iter(steps), 0.0)

    def fill_buffers(self, module: nn.Module) -> None:
        """As DeepSpeed does: those that the model has too."""
        buffers = dict(module.named_buffers())
        for name in self.states["buffer_names"]:
            if name in buffers:
                buffers[name].copy_(self.states["module"][name])


def check_switchable(engine: Engine, zero: str) -> None:
    """Raises UserError where an engine cannot be filled from a universal checkpoint, by which the next phase begins."""
    try:
        for _ in flats(engine.deepspeed.optimizer):
            pass
    except UserError as error:
        raise UserError(f"--zero {zero}: a run of several phases is resumed at every switch, and {error}") from error


def _create_state(flat: Flat, step: float) -> None:
    """Zero moments, as the optimizer makes them at its first update, and the step that replaces any it has counted."""
    state = flat.optimizer.state[flat.master]
    if isinstance(flat.optimizer, torch.optim.AdamW):
        group = flat.optimizer.param_groups[0]
        on_device = group["fused"] or group["capturable"]
        state[STEP] = torch.tensor(step, dtype=torch.float32, device=flat.master.device if on_device else "cpu")
    else:
        state[STEP] = int(step)  # DeepSpeed's optimizers count in Python
    for kind in MOMENTS:
        state[kind] = torch.zeros_like(flat.master, dtype=torch.float32, requires_grad=False)


def _set(flat: Flat, parameter: nn.Parameter, saved: _Saved, name: str) -> None:
    """Master and moments of one parameter: the part that this rank keeps."""
    set_master(flat, parameter, saved.read(name, MASTER))
    moments = {kind: saved.read(name, kind) for kind in MOMENTS}
    if is_sharded(parameter):
        for kind, value in moments.items():
            safe_set_local_optimizer_state(parameter, part_of(value, parameter), kind)
    elif flat.is_whole:
        for kind, value in moments.items():
            flat.optimizer.state[flat.master][kind].copy_(value)
    else:
        lazy_init_hp_params_optimizer_state([parameter], flat.master, flat.optimizer.state)
        for kind, value in moments.items():
            safe_set_full_optimizer_state(parameter, value, kind)


def _clear_padding(parameter: nn.Parameter) -> None:
    """ZeRO-3 leaves what it pads a fresh parameter with as it finds the memory, and saves it with the rest."""
    holder: Any = parameter
    size, rank = holder.partition_numel(), holder.ds_zero_partition_rank
    local = safe_get_local_fp32_param(parameter).clone()
    local.reshape(-1)[max(0, full_shape(parameter).numel() - rank * size) :] = 0
    safe_set_local_fp32_param(parameter, local)
