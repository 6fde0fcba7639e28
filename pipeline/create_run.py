"""From a resolved config to a run that can be stepped: model, data, engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from pipeline.checkpoint.compatibility import phase_to_run
from pipeline.checkpoint.frozen import frozen_weights
from pipeline.checkpoint.restore import read_progress
from pipeline.checkpoint.rng import seed_all
from pipeline.checkpoint.trainable import load_trainable
from pipeline.checkpoint.universal import check_switchable
from pipeline.compilation import compile_blocks
from pipeline.config import RunConfig
from pipeline.data.batch import StatefulLoader
from pipeline.data.resume import different_rank
from pipeline.engine import Engine
from pipeline.load import Resolved, load_model
from pipeline.parallel.collectives import all_gather_object, raise_together, shared_errors
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import full_shape
from pipeline.phases import Phases, pick
from pipeline.precision import different_precision, precision_here, precision_of
from pipeline.run import Progress, Run
from pipeline.runtime.folder_lock import FolderLock
from pipeline.runtime.ranks import device_of
from pipeline.system import Phase


def create_run(
    resolved: Resolved,
    topology: Topology,
    *,
    weights: Path | None = None,
    checkpoint: Path | None = None,
    lock: FolderLock | None = None,
) -> Run:
    """A run at the start of a phase, with the trained weights of the checkpoint `weights`.

    The phase is the first, or the one in which a run goes on from `checkpoint`, which `restore` then puts it back to;
    parameters that other phases train are as they were there. Collective; raises UserError.
    """
    config, system = resolved.config, resolved.system
    raise_together(topology, different_precision(config.precision, all_gather_object(topology, precision_here(config))))
    # Nothing that is trained depends on a process's own generators; what else draws from them is repeatable too.
    seed_all(config.seed, f"rank {topology.rank} of {topology.world}")
    loaded = load_model(config, system, topology, ds_config=resolved.ds_config, weights=weights, checkpoint=checkpoint)
    model = loaded.model
    with shared_errors(topology):
        phases = phases_of(config, loaded.phases, checkpoint)
    phase = phases.current
    # No shard holds what the phase of the checkpoint did not train, and the first phase follows none.
    unsharded = phases.at_rest | (phases.fresh if phases.index else frozenset())
    if checkpoint is not None and unsharded:
        load_trainable(model, checkpoint, topology, only=unsharded)
    with shared_errors(topology):
        loader: StatefulLoader = system.loader(phase, topology)
    frozen = frozen_weights(model, phases.trained, topology)
    compiled = compile_blocks(config, system, model)
    engine = Engine(model, phase, config, resolved.ds_config)
    if phases.after:
        with shared_errors(topology):
            check_switchable(engine, config.zero)
    # The first look at the data's fingerprint reads the data, which one rank may fail at.
    with shared_errors(topology):
        fingerprint = loader.state_dict()["fingerprint"]
    raise_together(topology, different_rank(all_gather_object(topology, fingerprint)))
    device = device_of(topology)
    return Run(
        config=config,
        topology=topology,
        device=device,
        system=system,
        phase=phase,
        engine=engine,
        loader=loader,
        ds_config=resolved.ds_config,
        frozen=frozen,
        phases=phases,
        progress=Progress(phase=phase.name),
        lock=lock or FolderLock(),
        chosen={
            **describe(resolved, phases, model, loader, topology, device),
            **({"compiled": f"{compiled} blocks, each at its first step"} if compiled else {}),
        },
    )


def phases_of(config: RunConfig, phases: Sequence[Phase], checkpoint: Path | None) -> Phases:
    """The phases of a run, of those of its system, at the one that a start trains. Raises UserError."""
    every = pick(config, phases)
    progress = None if checkpoint is None else read_progress(checkpoint)
    index = phase_to_run(config, every, progress, str(checkpoint))
    trained = dict.fromkeys(name for phase in phases for group in phase.groups for name in group.parameters)
    return Phases(every, index, alone=config.phase is not None, trained=tuple(trained))


def describe(
    resolved: Resolved,
    phases: Phases,
    model: nn.Module,
    loader: StatefulLoader,
    topology: Topology,
    device: torch.device,
) -> dict[str, str]:
    """What was chosen for this machine, for the log: layout, backends, data, parameters."""
    config, system, phase = resolved.config, resolved.system, phases.current
    dtype = precision_of(config)
    sizes = {name: math.prod(full_shape(parameter)) for name, parameter in model.named_parameters()}
    trainable = sum(sizes[name] for group in phase.groups for name in group.parameters)
    ranks = "1 rank" if topology.world == 1 else f"{topology.world} ranks"
    several = len(phases.every) > 1
    number = f"{phase.name}, {phases.index + 1} of {len(phases.every)}, of up to {phase.steps:,} steps"
    return {
        config.recipe: f"{ranks} (data {topology.data} x sequence {topology.sequence}),"
        f" {config.zero}, {str(dtype).removeprefix('torch.')} on {device.type}",
        **({"phase": number} if several else {}),
        "parameters": f"{sum(sizes.values()):,}, of which {trainable:,} are trained",
        **system.describe(device.type, dtype),
        "data": loader.describe(),
    }
