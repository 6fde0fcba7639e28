"""A decoder's FLOPs are those that PyTorch counts in its matrix products, and those of published tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from pipeline.lm.config import BackboneConfig
from pipeline.lm.flops import attention_flops, causal_reach, decoder_flops
from pipeline.lm.pretrained import backbone_config
from pipeline.recipes import all_recipes
from pipeline.system import create_system

LENGTH = 24


def small(**changes: Any) -> PreTrainedConfig:
    sizes: dict[str, Any] = {"layers": 3, "width": 32, "heads": 4, "kv_heads": 4, "ffn": 48, "vocabulary": 64}
    return backbone_config(BackboneConfig(trainable=True, **{**sizes, **changes}))


@pytest.mark.parametrize(
    "changes", [{}, {"tied": True}, {"kv_heads": 2, "model_type": "llama"}, {"model_type": "olmo", "tied": True}]
)
def test_they_are_what_pytorch_counts(changes: dict[str, Any]) -> None:
    """Of attention as two products of whole squares, forward: causal attention needs a half of them."""
    config = small(**changes)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    embedded = torch.randn(1, LENGTH, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    reaches = LENGTH - causal_reach(LENGTH)
    unseen = LENGTH * config.num_hidden_layers * attention_flops(config, reaches)
    counted = decoder_flops(config, LENGTH)
    assert counted.forward * LENGTH == forward - unseen
    assert counted.total * LENGTH == counter.get_total_flops() - 3 * unseen


@pytest.mark.parametrize(
    ("name", "length", "applied"),
    [("olmo_1b", 2048, 1_176_764_416), ("olmo_1b_0724", 4096, 1_176_764_416), ("olmo2_1b", 4096, 1_279_262_720)],
)
def test_a_billion_parameters(name: str, length: int, applied: int) -> None:
    """Six FLOPs for every parameter that multiplies, three times a query's 4 x 2048 for each key of 16 layers."""
    config = all_recipes()[name]()
    assert config.sequence_length == length
    attention = 3 * 16 * 4 * 2048 * (length + 1) / 2
    assert create_system(config).flops(length).total == 6 * applied + attention
