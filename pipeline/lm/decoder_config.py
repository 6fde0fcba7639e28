"""What a transformers config says of a decoder, asked alike of every family that fits; and what does not fit."""

from __future__ import annotations

from typing import Any, get_args

from transformers import PreTrainedConfig

from pipeline.errors import UserError, shown
from pipeline.lm.config import AttentionConfig, ModelType

MODEL_TYPES: tuple[str, ...] = get_args(ModelType)
FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the sequence."""
SLIDING = ("mistral", "qwen2", "qwen3")
"""Model types whose layers may have a window of their own."""
NORMED_QUERIES = ("olmo2", "qwen3")
"""Model types with norms of queries and keys."""
NORM_EPS = 1e-5
"""Epsilon of norms of which a config says nothing, such as OLMo's."""


def head_dim(config: PreTrainedConfig) -> int:
    """The size of an attention head, which some families choose apart from the hidden size."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads(config: PreTrainedConfig) -> int:
    """Key-value heads; as many as attention heads where the config does not group them."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def attention_width(config: PreTrainedConfig) -> int:
    """The queries of a token, all heads together, and what attention gives."""
    return config.num_attention_heads * head_dim(config)


def kv_width(config: PreTrainedConfig) -> int:
    """The keys of a token, all heads together, and its values."""
    return kv_heads(config) * head_dim(config)


def norm_width(config: PreTrainedConfig) -> int:
    """What the norms of a block take in per token, all together: two like the hidden states, and where the family has
    them those of queries and keys."""
    own = attention_width(config) + kv_width(config) if config.model_type in NORMED_QUERIES else 0
    return 2 * config.hidden_size + own


def norm_eps(config: PreTrainedConfig) -> float:
    """Epsilon of the decoder's norms."""
    return getattr(config, "rms_norm_eps", NORM_EPS)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Tokens that the layers with a window of their own see, the query's included; None where no layer has one."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if config.model_type not in SLIDING or window is None or (kinds is not None and "sliding_attention" not in kinds):
        return None
    return int(window)


def check_model_type(config: PreTrainedConfig, flag: str) -> None:
    """Raises UserError, which begins with `flag`, for a model type that is not supported."""
    if config.model_type not in MODEL_TYPES:
        raise UserError(
            f"{flag}: its model type is {shown(config.model_type)}: give weights of one of {', '.join(MODEL_TYPES)}"
        )


def check_decoder(config: PreTrainedConfig, flag: str) -> None:
    """Raises UserError, which begins with `flag`, for a decoder of these types that would compute something else here
    than in transformers."""
    rope: Any = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind not in FIXED_ROPES:
        raise UserError(
            f"{flag}: its rotary embedding is of the type {shown(kind)}, which is not supported: give weights with one"
            f" of {', '.join(FIXED_ROPES)}"
        )
    part = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    if part != 1.0:
        raise UserError(f"{flag}: it rotates {shown(part)} of each head, here all of a head is rotated: give others")
    if head_dim(config) % 2:
        raise UserError(f"{flag}: its heads have the odd size {head_dim(config)}, which rotary embeddings cannot turn")


def check_window(attention: AttentionConfig, config: PreTrainedConfig, sequence_length: int) -> None:
    """Raises UserError when attention would see more than the layers of a decoder with a sliding window do."""
    limit = sliding_window(config)
    seen = attention.window if attention.kind == "window" else sequence_length
    if limit is None or seen <= limit:
        return
    given = f"window {seen}" if attention.kind == "window" else f"kind full with --sequence-length {seen}"
    raise UserError(
        f"--model.attention.{given}: layers of this backbone see {limit} tokens: give --model.attention.kind window"
        f" --model.attention.window {limit}, or less"
    )
