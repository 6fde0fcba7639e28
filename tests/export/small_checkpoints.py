"""Checkpoints of small models with random weights, written without training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.checkpoint.files import checksum, write_tensors
from pipeline.checkpoint.frozen import frozen_weights
from pipeline.checkpoint.manifest import write_manifest
from pipeline.checkpoint.restore import TRAINER_STATE
from pipeline.checkpoint.trainable import TRAINABLE
from pipeline.config import RunConfig, replace
from pipeline.config_file import save_config
from pipeline.engine import building
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import generator_for
from pipeline.recipes.miras import miras_tiny
from pipeline.recipes.olmo import olmo_tiny
from pipeline.run import Progress
from pipeline.system import System, create_system

STEP = 3


def dense(model_type: str = "olmo", **backbone: Any) -> RunConfig:
    """Of the recipe olmo_tiny, with a decoder of two layers."""
    config = olmo_tiny()
    sizes: dict[str, Any] = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 4, "ffn": 48, "tied": False}
    section = dataclasses.replace(config.model.backbone, model_type=model_type, **{**sizes, **backbone})  # type: ignore[attr-defined]
    return replace(config, model=dataclasses.replace(config.model, backbone=section), sequence_length=96)  # type: ignore[call-arg]


def with_memory(**backbone: Any) -> RunConfig:
    """Of the recipe miras_tiny, with a frozen decoder of two layers and a window of 16 tokens."""
    config = miras_tiny()
    sizes: dict[str, Any] = {
        "trainable": False, "layers": 2, "width": 32, "heads": 2, "kv_heads": 2, "ffn": 48, "vocabulary": 260,
    }  # fmt: skip
    model: Any = config.model
    model = dataclasses.replace(
        model,
        backbone=dataclasses.replace(model.backbone, **{**sizes, **backbone}),
        attention=dataclasses.replace(model.attention, window=16),
        memory=dataclasses.replace(model.memory, layers=(1,), heads=2, head_dim=8, gate_rank=4, persistent=2, chunk=8),
    )
    parallel = dataclasses.replace(config.parallel, sequence=1)
    return replace(config, model=model, parallel=parallel, sequence_length=64)


def built(config: RunConfig, dtype: torch.dtype = torch.float32, seed: int = 5) -> tuple[System[Any], nn.Module]:
    """A system and its model; what a run trains is noise that nobody starts with."""
    system = create_system(config)
    with building({}, dtype):
        model = system.build()
    system.initialise(model, Topology())
    trained = {name for phase in system.phases(model) for group in phase.groups for name in group.parameters}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                noise = torch.randn(parameter.shape, generator=generator_for(seed, name)) * 0.2
                parameter.copy_(noise + (1.0 if "norm" in name else 0.0))
    return system, model.eval()


def save(folder: Path, config: RunConfig, system: System[Any], model: nn.Module, without: str = "") -> Path:
    """The checkpoint of step STEP of a run in `folder`; `without` what a trained tensor's name holds. Returns it."""
    checkpoint = folder / "checkpoints" / f"checkpoint-{STEP}"
    checkpoint.mkdir(parents=True)
    trained = {name for phase in system.phases(model) for group in phase.groups for name in group.parameters}
    tensors = {
        name: value.detach().contiguous()
        for name, value in model.named_parameters()
        if name in trained and not (without and without in name)
    }
    files = {TRAINABLE: write_tensors(tensors, checkpoint / TRAINABLE)}
    save_config(replace(config, output_dir=folder), checkpoint / "config.yaml")
    progress = Progress(step=STEP, phase="train", tokens=1234)
    (checkpoint / TRAINER_STATE).write_text(json.dumps(dataclasses.asdict(progress)))
    files |= {name: checksum(checkpoint / name) for name in ("config.yaml", TRAINER_STATE)}
    facts = {"step": STEP, "recipe": config.recipe, "system": config.model.system, "global_batch": 4,
             "frozen": frozen_weights(model, trained, Topology()), "versions": {"mnemos": "9.9"},
             "data_fingerprint": "of the data"}  # fmt: skip
    write_manifest(checkpoint, facts, files)
    return checkpoint


def checkpoint_of(folder: Path, config: RunConfig, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    return save(folder, config, *built(config, dtype), **changes)
