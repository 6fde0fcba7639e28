"""Model FLOPs of a decoder per token: the one convention of the project (docs/metrics.md#mfu).

A multiply-add is two FLOPs. Every matrix that a token is multiplied by counts, the output embedding included, tied or
not; the look-up of the input embedding, norms, activations and the softmax do not. Attention is causal: a query meets
the keys before it and no others. Backward costs twice forward, and what is recomputed is not counted again.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from pipeline.lm.decoder_config import attention_width, kv_width
from pipeline.system import Flops


def block_flops(backbone: PreTrainedConfig) -> float:
    """The matrices of one decoder block, forward: projections of attention, and three of the feed-forward part."""
    width = backbone.hidden_size
    inner = 2 * width * attention_width(backbone) + 2 * width * kv_width(backbone)
    return 2.0 * (inner + 3 * width * backbone.intermediate_size)


def attention_flops(backbone: PreTrainedConfig, reach: float) -> float:
    """Scores and weighted sum of one layer's attention, forward, for a query that meets `reach` keys."""
    return 4.0 * attention_width(backbone) * reach


def head_flops(backbone: PreTrainedConfig) -> float:
    """The output embedding, forward."""
    return 2.0 * backbone.hidden_size * backbone.vocab_size


def causal_reach(sequence_length: int) -> float:
    """Mean number of keys that a query of full causal attention meets, itself included."""
    return (sequence_length + 1) / 2


def decoder_flops(backbone: PreTrainedConfig, sequence_length: int) -> Flops:
    """Forward and backward of a decoder that is trained as a whole, with full causal attention over the sequence."""
    block = block_flops(backbone) + attention_flops(backbone, causal_reach(sequence_length))
    forward = backbone.num_hidden_layers * block + head_flops(backbone)
    return Flops(forward, 2 * forward)
