"""Checkpoints of small random models, as a run saves them, without DeepSpeed's shards."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.checkpoint.files import checksum, write_tensors
from pipeline.checkpoint.frozen import frozen_weights
from pipeline.checkpoint.manifest import write_manifest
from pipeline.checkpoint.trainable import AVERAGE, TRAINABLE, trainable_content
from pipeline.config import RunConfig, replace
from pipeline.config_file import save_config
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import fill, generator_for
from pipeline.recipes.miras import miras_tiny
from pipeline.recipes.olmo import olmo_tiny
from pipeline.system import System, create_system

SIZES: dict[str, Any] = {"layers": 2, "width": 32, "heads": 2, "kv_heads": 2, "ffn": 48}
LIMIT = 64


def olmo(**changes: Any) -> RunConfig:
    """Of LIMIT tokens at the most."""
    model: Any = olmo_tiny().model
    backbone = dataclasses.replace(model.backbone, **SIZES)
    return replace(olmo_tiny(), model=dataclasses.replace(model, backbone=backbone), sequence_length=LIMIT, **changes)


def miras(pretrained: str | None = None, **memory: Any) -> RunConfig:
    """`pretrained`: with a frozen backbone."""
    model: Any = miras_tiny().model
    own = {**SIZES, "pretrained": pretrained, "trainable": pretrained is None}
    model = dataclasses.replace(
        model,
        backbone=dataclasses.replace(model.backbone, **own),
        memory=dataclasses.replace(model.memory, **{"layers": (1,), "heads": 2, "head_dim": 16, **memory}),
        attention=dataclasses.replace(model.attention, window=16),
    )
    return replace(miras_tiny(), model=model)


def checkpoint(
    folder: Path, config: RunConfig, without: tuple[str, ...] = (), *, averaged: bool = False
) -> tuple[System, nn.Module]:
    """Writes a checkpoint of random weights, lacking those of the names `without`, and with an average that is another
    one where it is `averaged`; gives the system and its model."""
    system = create_system(config)
    model = system.build()
    system.initialise(model, Topology())
    trained = [name for phase in system.phases(model) for group in phase.groups for name in group.parameters]
    fill(model, _random, trained)
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    content, _ = trainable_content(model, [name for name in trained if name not in without], Topology())
    copied = {name: tensor.clone() for name, tensor in content.items()}
    facts = {"system": config.model.system, "step": 5, "frozen": frozen_weights(model, trained, Topology())}
    files = {"config.yaml": checksum(folder / "config.yaml"), TRAINABLE: write_tensors(copied, folder / TRAINABLE)}
    if averaged:
        average = {name: -model.get_parameter(name).detach() for name in trained}
        files[AVERAGE] = write_tensors(average, folder / AVERAGE)
    write_manifest(folder, facts, files)
    return system, model.eval()


def _random(name: str, shape: torch.Size) -> torch.Tensor:
    """Nothing is zero: gates, output projections and norms included."""
    noise = torch.randn(shape, generator=generator_for(7, name))
    if name.endswith(("norm.weight", "layernorm.weight", "head_norm", "context_norm")):
        return 1 + 0.3 * noise
    return noise * (0.3 if len(shape) > 1 else 0.7)
