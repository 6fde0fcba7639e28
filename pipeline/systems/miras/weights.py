"""Initial weights of the miras model: a pretrained backbone's, random ones by name, and the memory's own."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.lm.pretrained import pretrained_tensors
from pipeline.ops.gates import initial_alpha_logits, initial_beta_logits, initial_eta_logit, logit
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import fill, generator_for, is_sharded, load_safetensors
from pipeline.systems.miras.config import MemoryConfig, MirasConfig


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
    fill(model, lambda name, shape: _random(name, shape, config, seed), random)


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


def _random(name: str, shape: torch.Size, config: MirasConfig, seed: int) -> Tensor:
    generator = generator_for(seed, name)
    memory, leaf = config.memory, name.rsplit(".", 2)[-2:]
    if name.startswith("backbone."):
        if "norm" in leaf[0]:
            return torch.ones(shape)
        if leaf[-1] == "bias":
            return torch.zeros(shape)
        return torch.randn(shape, generator=generator) * config.backbone.initializer_range
    match leaf:
        case [_, "head_norm" | "context_norm"] | ["norm", "weight"]:
            return torch.ones(shape)
        case ["o_proj", "weight"] | ["gate_up", "bias"] | [_, "out_gate"] | ["context_gate", _]:
            return torch.zeros(shape)
        case [_, "q_map" | "k_map" | "share_query" | "step_key"] | ["share_proj", "weight"]:
            return torch.zeros(shape)
        case [_, "eta_logits"]:
            return torch.full(shape, initial_eta_logit(memory.momentum))
        case ["share_proj", "bias"]:
            return torch.full(shape, logit(memory.share))
        case ["alpha_proj", "bias"] | [_, "alpha_logits"]:
            return initial_alpha_logits(shape[0], memory.half_life)
        case ["beta_proj", "bias"]:
            momentum = memory.momentum if memory.has_momentum else 0.0
            return initial_beta_logits(shape[0], momentum, memory.step_size, memory.stretch)
        case [_, "conv"]:
            return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(memory.conv)
        case [_, "persistent_k"]:
            return torch.randn(shape, generator=generator)
        case [_, "persistent_v"]:
            return torch.randn(shape, generator=generator) * config.backbone.initializer_range
        case ["rule", "delta_bias"]:
            # The inverse of the softplus.
            delta = memory.yaad.delta
            return torch.full(shape, delta + math.log(-math.expm1(-delta)))
        case ["rule", "delta_weight"]:
            return torch.zeros(shape)
        case ["rule", "w_in"]:
            return torch.randn(shape, generator=generator) / math.sqrt(memory.head_dim)
        case ["rule", "w_gate" | "w_up"]:
            # Keys have unit length: preactivations start at unit size.
            return torch.randn(shape, generator=generator)
        case ["rule", "w_out" | "w_down"]:
            return torch.randn(shape, generator=generator) / math.sqrt(shape[-2])
        case [_, "context_kv" | "write"]:
            return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        case ["alpha_proj" | "beta_proj", "weight"]:
            return torch.randn(shape, generator=generator) * config.backbone.initializer_range
        case [_, "weight"]:
            return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    raise AssertionError(f"no initial value is defined for {name}")
