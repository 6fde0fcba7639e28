"""From a resolved config to a run that can be stepped: model, data, engine."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from pipeline.checkpoint.frozen import frozen_weights
from pipeline.checkpoint.rng import seed_all
from pipeline.data.batch import StatefulLoader
from pipeline.data.resume import different_rank
from pipeline.ds_config import precision_of
from pipeline.engine import Engine
from pipeline.load import Resolved, load_model
from pipeline.parallel.collectives import all_gather_object, raise_together, shared_errors
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import full_shape
from pipeline.run import Progress, Run
from pipeline.runtime.folder_lock import FolderLock
from pipeline.runtime.ranks import device_of
from pipeline.system import Phase


def create_run(
    resolved: Resolved, topology: Topology, *, weights: Path | None = None, lock: FolderLock | None = None
) -> Run:
    """A run at its start, with the trained weights of the checkpoint `weights`. Collective; raises UserError."""
    config, system = resolved.config, resolved.system
    # Nothing that is trained depends on a process's own generators; what else draws from them is repeatable too.
    seed_all(config.seed, f"rank {topology.rank} of {topology.world}")
    loaded = load_model(config, system, topology, ds_config=resolved.ds_config, weights=weights)
    model = loaded.model
    if len(loaded.phases) != 1:
        count = len(loaded.phases)
        raise ValueError(f"{system.name} has {count} phases: the loop runs one until moments carry over by name")
    (phase,) = loaded.phases
    with shared_errors(topology):
        loader: StatefulLoader = system.loader(phase, topology)
    trained = {name for group in phase.groups for name in group.parameters}
    frozen = frozen_weights(model, trained, topology)
    engine = Engine(model, phase, config, resolved.ds_config)
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
        progress=Progress(phase=phase.name),
        lock=lock or FolderLock(),
        chosen=describe(resolved, phase, model, loader, topology, device),
    )


def describe(
    resolved: Resolved, phase: Phase, model: nn.Module, loader: StatefulLoader, topology: Topology, device: torch.device
) -> dict[str, str]:
    """What was chosen for this machine, for the log: layout, backends, data, parameters."""
    config, system = resolved.config, resolved.system
    dtype = precision_of(config)
    sizes = {name: math.prod(full_shape(parameter)) for name, parameter in model.named_parameters()}
    trainable = sum(sizes[name] for group in phase.groups for name in group.parameters)
    ranks = "1 rank" if topology.world == 1 else f"{topology.world} ranks"
    return {
        config.recipe: f"{ranks} (data {topology.data} x sequence {topology.sequence}),"
        f" {config.zero}, {str(dtype).removeprefix('torch.')} on {device.type}",
        "parameters": f"{sum(sizes.values()):,}, of which {trainable:,} are trained",
        **system.describe(device.type, dtype),
        "data": loader.describe(),
    }
