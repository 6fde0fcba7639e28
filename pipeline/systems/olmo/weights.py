"""Initial weights of the olmo model: pretrained ones, or OLMo's random ones, by name."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pipeline.lm.pretrained import pretrained_tensors
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import fill, generator_for, load_safetensors
from pipeline.systems.olmo.config import CUTOFF, OlmoConfig


def initialise(model: nn.Module, config: OlmoConfig, seed: int, topology: Topology) -> None:
    """Fills every parameter of an `OlmoModel`, sharded or not. Collective; raises UserError."""
    backbone: Any = model.backbone
    if config.backbone.pretrained is None:
        fill(model, lambda name, shape: random_weight(name, shape, config, backbone.config, seed))
        return
    rename = {name: name.removeprefix("backbone.") for name, _ in model.named_parameters()}
    find = functools.partial(pretrained_tensors, config.backbone, backbone.config)
    load_safetensors(model, find, rename, topology, what=f"--model.backbone.pretrained {config.backbone.pretrained}")


def random_weight(name: str, shape: torch.Size, config: OlmoConfig, backbone: PreTrainedConfig, seed: int) -> Tensor:
    """The initial value of a parameter, which depends on the seed, its name and the sizes alone."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    std = standard_deviation(name, config, backbone)
    value = torch.empty(shape)
    return nn.init.trunc_normal_(value, 0.0, std, -CUTOFF * std, CUTOFF * std, generator=generator_for(seed, name))


def standard_deviation(name: str, config: OlmoConfig, backbone: PreTrainedConfig) -> float:
    """Of a matrix before its truncation, as OLMo's `initialization.py` and `olmo/model.py` have it.

    mitchell: the embeddings and what reads the hidden states have 1 / sqrt(width); what is added to them in layer l,
    counted from 0, has 1 / sqrt(2 (l + 1) inputs).
    """
    if config.initialisation == "normal":
        return config.backbone.initializer_range
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer is not None and name.endswith(("o_proj.weight", "down_proj.weight")):
        inputs = backbone.intermediate_size if name.endswith("down_proj.weight") else backbone.hidden_size
        return 1 / math.sqrt(2 * (int(layer[1]) + 1) * inputs)
    return 1 / math.sqrt(backbone.hidden_size)
