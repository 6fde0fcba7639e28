"""Small decoders of every family that fits, of random weights, as transformers makes them; and their logits by ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.lm.attention import AttentionCall, Beside, plan_attention
from pipeline.lm.backbone import UNROTATED, rope_of
from pipeline.lm.config import AttentionConfig
from pipeline.parallel.topology import Topology

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    "max_position_embeddings": 256, "initializer_range": 0.15,
}  # fmt: skip
THETA = 100.0
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": THETA, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 64, "head_dim": 16},
    "olmo": {"model_type": "olmo", "num_key_value_heads": 4, "clip_qkv": 0.6},
    "olmo2": {
        "model_type": "olmo2",
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"model_type": "qwen2", "rope_parameters": {"rope_type": "linear", "rope_theta": THETA, "factor": 2.0}},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
}  # fmt: skip
"""By name: where each differs from `SIZES`. Scaled rotary frequencies, biases, grouped heads, heads of another size
than the width gives, tied embeddings, clipping, norms of queries and keys: each of them is in one at least."""


def decoder(name: str) -> Any:
    """A family's decoder on transformers' own attention, float32, with no norm or bias as it is at first."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
    config = AutoConfig.for_model(**{**SIZES, **rope, **FAMILIES[name]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def save_decoder(name: str, folder: Path) -> Path:
    """Saves `decoder(name)` in a folder, and returns it."""
    decoder(name).save_pretrained(folder)
    return folder


def plain_logits(model: Any, ids: Tensor, lengths: list[int]) -> Tensor:
    """What transformers gives for the documents of one row [1, tokens], each run by itself: [1, tokens, vocabulary]."""
    return torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)


def documents(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Segment ids and positions of one row, [1, tokens] each."""
    segments = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])
    return segments.unsqueeze(0), torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)


def our_logits(
    backbone: Any, ids: Tensor, lengths: list[int], attention: AttentionConfig, topology: Topology | None = None
) -> Tensor:
    """What the backbone gives on our attention for this rank's part of ids [1, tokens]."""
    topology = topology or Topology()
    segments, positions = documents(lengths)
    hidden = backbone.model.embed_tokens(ids[:, topology.shard(ids.shape[1])])
    plan = plan_attention(attention, backbone.config, rope_of(backbone), segments, positions, None, hidden)
    call = AttentionCall(plan, topology, [None] * len(backbone.model.layers))
    for layer in backbone.model.layers:
        hidden = layer(hidden, position_embeddings=UNROTATED, attention_call=call, beside=Beside())
    return backbone.lm_head(backbone.model.norm(hidden))
