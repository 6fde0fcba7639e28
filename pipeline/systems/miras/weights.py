"""Initial weights of the miras model: OLMo2's from a folder or the hub, random ones by name, and the memory's own."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Olmo2Config

from pipeline.errors import UserError
from pipeline.ops.gates import initial_alpha_logits, initial_beta_logits, initial_eta_logit
from pipeline.parallel.agreement import together
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import fill, generator_for, load_safetensors
from pipeline.systems.miras.config import BackboneConfig, MirasConfig


def backbone_config(config: BackboneConfig) -> Olmo2Config:
    """The transformers config of the backbone, without any network.

    A local folder or a cached hub name says it itself; otherwise the sizes of the section hold, and weights that differ
    from them are refused when they are read. Raises UserError.
    """
    if config.pretrained is not None:
        found = _local_config(config)
    else:
        found = None
    if found is None:
        found = Olmo2Config(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.norm_eps,
            initializer_range=config.initializer_range,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
        )
    if (found.hidden_size // found.num_attention_heads) % 2:
        raise UserError(
            f"--model.backbone.width {found.hidden_size} over --model.backbone.heads {found.num_attention_heads} makes"
            " heads of an odd size, which rotary embeddings cannot turn"
        )
    if found.tie_word_embeddings:
        raise UserError("the backbone ties its embeddings: OLMo2 weights with an untied output embedding are needed")
    return found


def _local_config(config: BackboneConfig) -> Olmo2Config | None:
    assert config.pretrained is not None
    try:
        found = AutoConfig.from_pretrained(
            config.pretrained, revision=config.revision, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        if Path(config.pretrained).is_dir():
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"--model.backbone.pretrained {config.pretrained}: no usable config.json there ({reason})"
            ) from error
        return None
    if not isinstance(found, Olmo2Config):
        raise UserError(
            f"--model.backbone.pretrained {config.pretrained}: its model type is {found.model_type!r}, not 'olmo2'"
        )
    return found


def weight_files(config: BackboneConfig) -> list[Path]:
    """The safetensors files of the pretrained backbone, downloaded when it is a hub name."""
    assert config.pretrained is not None
    folder = Path(config.pretrained)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(
                    config.pretrained, revision=config.revision, allow_patterns=["*.safetensors", "*.json"]
                )
            )
        except Exception as error:
            raise UserError(
                f"--model.backbone.pretrained {config.pretrained}: cannot be downloaded"
                f" ({type(error).__name__}): give a local folder"
            ) from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: holds no .safetensors file: convert the weights first")
    return files


def initialise(model: nn.Module, config: MirasConfig, seed: int, topology: Topology) -> None:
    """Fills every parameter of a `MirasModel`, sharded or not."""
    names = [name for name, _ in model.named_parameters()]
    random = names
    if config.backbone.pretrained is not None:
        rename = {name: name.removeprefix("backbone.") for name in names if name.startswith("backbone.")}
        files = together(topology, lambda: weight_files(config.backbone))
        load_safetensors(model, files, rename, topology, what=config.backbone.pretrained)
        random = [name for name in names if name not in rename]
    fill(model, lambda name, shape: _random(name, shape, config, seed), random)


def _random(name: str, shape: torch.Size, config: MirasConfig, seed: int) -> Tensor:
    generator = generator_for(seed, name)
    memory, leaf = config.memory, name.rsplit(".", 2)[-2:]
    if name.startswith("backbone."):
        if "norm" in leaf[0]:
            return torch.ones(shape)
        return torch.randn(shape, generator=generator) * config.backbone.initializer_range
    match leaf:
        case [_, "head_norm" | "context_norm"] | ["norm", "weight"]:
            return torch.ones(shape)
        case ["o_proj", "weight"] | ["gate_up", "bias"] | [_, "out_gate"] | ["context_gate", _]:
            return torch.zeros(shape)
        case [_, "eta_logits"]:
            return torch.full(shape, initial_eta_logit(memory.momentum))
        case ["alpha_proj", "bias"]:
            return initial_alpha_logits(memory.heads, memory.half_life)
        case ["beta_proj", "bias"]:
            momentum = memory.momentum if memory.has_momentum else 0.0
            return initial_beta_logits(memory.heads, momentum, memory.step_size)
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
