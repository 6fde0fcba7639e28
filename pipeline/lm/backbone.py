"""The decoder of a language-model system, as transformers builds it: its layers run here one by one, on our attention.

The layers are transformers' own, norms of queries and keys, clipping and biases included. They rotate queries and keys
before they call attention; given `UNROTATED`, they rotate by nothing, and our attention rotates after the exchange
(`pipeline.lm.attention`), where positions can be rebased.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from pipeline.lm.attention import ATTENTION_NAME
from pipeline.lm.loss_head import LossHead
from pipeline.ops.rope import Rope


def build_backbone(config: PreTrainedConfig) -> Any:
    """The decoder with a `LossHead`: a `...ForCausalLM` with `model.embed_tokens`, `model.layers`, `model.norm` and
    `lm_head`; parameter names as in transformers.

    Where the config ties the embeddings the head has no parameter of its own. Works on the meta device and where ZeRO-3
    shards each module as it is made.
    """
    # Our attention stands in for every implementation that transformers would choose.
    config._attn_implementation = ATTENTION_NAME
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    backbone = kind(config)
    backbone.lm_head = LossHead(config.hidden_size, config.vocab_size, bias=False)
    if config.tie_word_embeddings:
        backbone.lm_head.tie(backbone.model.embed_tokens)
    return backbone


def norms_and_ffns(backbone: Any) -> list[nn.Module]:
    """The modules of a decoder's layers that are more than one product and see one token at a time: norms, those of
    queries and keys too, and feed-forward networks. The last norm is none of a layer, and sees other numbers of tokens
    where a teacher is asked at some of them."""
    norms = [module for module in backbone.model.layers.modules() if type(module).__name__.endswith("Norm")]
    return [layer.mlp for layer in backbone.model.layers] + norms


def rope_of(backbone: Any) -> Rope:
    """The rotary frequencies of a decoder, float64."""
    # Made anew: the decoder's own is on the meta device, or in the model's precision.
    with torch.device("cpu"):
        rotary = type(backbone.model.rotary_emb)(backbone.config)
    return Rope(rotary.inv_freq.double(), float(rotary.attention_scaling))


class _Factor:
    """Stands for a tensor of one number in products with tensors, which are not computed. torch.compile traces it."""

    def unsqueeze(self, _dim: int) -> Any:
        return self


class _One(_Factor):
    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if function is torch.Tensor.mul else NotImplemented


class _Zero(_Factor):
    """Also what it makes of a product."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x, zero = args
        return {torch.Tensor.mul: zero, torch.Tensor.add: x}.get(function, NotImplemented)


UNROTATED: Any = (_One(), _Zero())
"""The `position_embeddings`, cosine and sine, with which a layer rotates by nothing: its `q * cos + rotate_half(q) *
sin` is q itself."""
