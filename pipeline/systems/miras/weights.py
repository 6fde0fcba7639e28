"""Filling a miras model, sharded or not: a pretrained backbone's weights, and random ones by name."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.lm.pretrained import pretrained_tensors
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import fill, generator_for, is_sharded, load_safetensors
from pipeline.systems.miras.config import MemoryConfig, MirasConfig
from pipeline.systems.miras.initial_values import initial_value


def initialise(model: nn.Module, config: MirasConfig, seed: int, topology: Topology) -> None:
    """Fills every parameter of a `MirasModel`, sharded or not."""
    names = [name for name, _ in model.named_parameters()]
    random = names
    if config.backbone.pretrained is not None:
        rename = {name: name.removeprefix("backbone.") for name in names if name.startswith("backbone.")}
        what = f"--model.backbone.pretrained {config.backbone.pretrained}"
        backbone: Any = model.backbone
        find = functools.partial(pretrained_tensors, config.backbone, backbone.config)
        load_safetensors(model, find, rename, topology, what=what)
        random = [name for name in names if name not in rename]

    def value(name: str, shape: torch.Size) -> Tensor:
        return initial_value(name, shape, config, generator_for(seed, name))

    fill(model, value, random)


def check_gathering(model: nn.Module, config: MemoryConfig, topology: Topology) -> None:
    """Raises UserError where ranks would wait for each other in vain.

    ZeRO-3 gathers a rule's own parameters whenever the rule is used: once per stage of `mac`, of which data ranks with
    other documents have another number.
    """
    own = [p for name, p in model.named_parameters() if ".rule." in name and is_sharded(p)]
    if config.attachment == "mac" and topology.data > 1 and own:
        raise UserError(
            f"--model.memory.attachment mac with --model.memory.rule {config.rule}: ZeRO-3 would gather its weights at"
            " other moments on every data rank: give --zero zero2, or one data rank (--parallel.sequence)"
        )
