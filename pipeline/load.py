"""From a config to a model with its weights: the one place where they are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.capabilities import CountsEpochs
from pipeline.checkpoint.compatibility import check_resumable, check_sizes, keep_global_batch
from pipeline.checkpoint.trainable import load_average, load_trainable, trainable_names
from pipeline.compilation import check_compile
from pipeline.config import RunConfig
from pipeline.ds_config import check_precision, deepspeed_config
from pipeline.durations import in_epochs
from pipeline.engine import building
from pipeline.intervals import check_intervals
from pipeline.parallel.collectives import broadcast_object, shared_errors
from pipeline.parallel.topology import Topology
from pipeline.precision import precision_of
from pipeline.system import Phase, System, create_system


@dataclass(frozen=True)
class Resolved:
    """What a run does, decided before anything is built."""

    config: RunConfig
    """With what the data decides, and as many micro-batches as keep the global batch of the checkpoint that it goes on
    from."""
    system: System
    """With the `files` of rank 0."""
    ds_config: dict[str, Any]


@dataclass(frozen=True)
class LoadedModel:
    """A system, its model and the phases of its training."""

    system: System
    model: nn.Module
    phases: Sequence[Phase]


def checked_system(config: RunConfig, topology: Topology) -> System:
    """The system of a config. Raises UserError when it cannot run on this layout of ranks."""
    system = create_system(config)
    system.check(topology)
    check_intervals(config, system)
    return system


def resolve(system: System, topology: Topology, checkpoint: Path | None = None) -> Resolved:
    """Decides what a run does that begins anew, or goes on from `checkpoint`. Collective; raises UserError on every
    rank when it cannot."""
    _share_files(system, topology, ask_servers=True)
    with shared_errors(topology):
        return decide(system, topology, checkpoint)


def decide(system: System, topology: Topology, checkpoint: Path | None = None) -> Resolved:
    """As `resolve`, by one process for all, of a system whose `files` are set. Raises UserError."""
    check_precision(system.config)
    system = _settled(system, topology)
    if checkpoint is not None:
        check_resumable(system.config, checkpoint)
        resumed = keep_global_batch(system.config, topology, checkpoint)
        # Of steps of another size there are more or fewer in an epoch.
        system = _settled(_with_config(system, resumed), topology)
    config = system.config
    ds_config = deepspeed_config(config)
    check_compile(config, system, topology, ds_config)
    return Resolved(config, system, ds_config)


def _share_files(system: System, topology: Topology, *, ask_servers: bool) -> None:
    """What rank 0 finds of the data, for all ranks and for both sides of the hold-out: a folder may change while it is
    read. Collective; raises UserError on every rank."""
    with shared_errors(topology):
        listed = system.list_data(ask_servers=ask_servers) if topology.rank == 0 else None
    system.files = broadcast_object(topology, listed)


def _settled(system: System, topology: Topology) -> System:
    """The system of the config with all that the data decides: sizes, and the steps in its epochs."""
    system = _with_config(system, system.settled(topology))
    if isinstance(system, CountsEpochs):
        system = _with_config(system, in_epochs(system.config, system.steps_per_epoch(topology)))
    return system


def _with_config(system: System, config: RunConfig) -> System:
    """The system of another config of the same run."""
    if config == system.config:
        return system
    other = create_system(config)
    other.files = system.files
    return other


def load_model(
    config: RunConfig,
    system: System,
    topology: Topology,
    *,
    ds_config: dict[str, Any] | None = None,
    weights: Path | None = None,
    checkpoint: Path | None = None,
    raw: bool = False,
) -> LoadedModel:
    """Builds the model and fills it: pretrained or random weights, then those that the checkpoint `weights` trained,
    and the moving average of them that it has, unless `raw`.

    `ds_config`: the configuration whose ZeRO stage shards it; None: it is whole on every rank. `checkpoint`: the one
    that fills later what was trained. Collective; raises UserError on every rank.
    """
    if system.files is None:
        # Only training is sure to read the data: an evaluation may be made where the servers cannot be reached.
        _share_files(system, topology, ask_servers=ds_config is not None)
    with building(ds_config or {}, precision_of(config)):
        model = system.build()
    filled = [trainable_names(folder, topology) for folder in (weights, checkpoint) if folder is not None]
    system.replaced = frozenset[str]().union(*filled)
    system.initialise(model, topology)
    if weights is not None:
        with shared_errors(topology):
            check_sizes(config, model, weights)
        load_trainable(model, weights, topology)
        if not raw:
            load_average(model, weights, topology)
    return LoadedModel(system, model, system.phases(model))


def model_without_storage(config: RunConfig) -> LoadedModel:
    """The whole model on the meta device: shapes, and no weights."""
    system = create_system(config)
    with torch.device("meta"):
        model = system.build()
    return LoadedModel(system, model, system.phases(model))
