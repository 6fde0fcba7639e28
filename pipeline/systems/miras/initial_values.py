"""Random initial values of a miras model's parameters, by name: a backbone's, and the memory's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.ops.gates import initial_alpha_logits, initial_beta_logits, initial_eta_logit, logit
from pipeline.systems.miras.config import MirasConfig


def initial_value(name: str, shape: torch.Size, config: MirasConfig, generator: torch.Generator | None) -> Tensor:
    """Of a parameter by its name in a `MirasModel`, drawn with `generator`; None: torch's own. On the CPU."""
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
        case [_, "q_map" | "k_map" | "share_query" | "step_key"] | ["share_proj", "weight"] | ["shift_proj", _]:
            return torch.zeros(shape)
        case [_, "shift_query" | "key_map" | "value_map" | "importance_key" | "importance_value"]:
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
