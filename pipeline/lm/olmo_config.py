"""The `model` section of an OLMo config.yaml that describes a decoder of transformers.

Source: github.com/allenai/OLMo, olmo/config.py (ModelConfig).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Olmo2Config, PreTrainedConfig

from pipeline.errors import UserError
from pipeline.lm.decoder_config import NORM_EPS, head_dim, kv_heads

BOTH: Mapping[str, Any] = {
    "block_type": "sequential", "activation_type": "swiglu", "rope": True, "alibi": False, "scale_logits": False,
    "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0,
}  # fmt: skip
FIRST: Mapping[str, Any] = {"layer_norm_type": "default", "attention_layer_norm": False, "norm_after": False}
SECOND: Mapping[str, Any] = {"layer_norm_type": "rms", "attention_layer_norm": True, "norm_after": True}
"""What it says of the decoders that transformers has as OlmoForCausalLM and Olmo2ForCausalLM."""


def model_section(config: PreTrainedConfig, *, vocabulary: int, eos: int, length: int) -> dict[str, Any]:
    """The `model` section of a decoder that `olmo_layout.has_layout`.

    `vocabulary`: ids of the tokenizer; the embedding may have more rows. `eos`: the id that ends a document. `length`:
    tokens of a training sequence.
    """
    second = isinstance(config, Olmo2Config)
    rope: Any = config.rope_parameters or {}
    return {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": kv_heads(config),
        "n_layers": config.num_hidden_layers,
        "mlp_hidden_size": 2 * config.intermediate_size,
        **BOTH,
        **(SECOND if second else FIRST),
        "layer_norm_with_affine": second,
        "attention_layer_norm_with_affine": second,
        "layer_norm_eps": config.rms_norm_eps if isinstance(config, Olmo2Config) else NORM_EPS,
        "rope_theta": float(rope.get("rope_theta", 10_000.0)),
        "clip_qkv": getattr(config, "clip_qkv", None),
        "include_bias": False,
        "bias_for_layer_norm": False,
        "weight_tying": bool(config.tie_word_embeddings),
        "max_sequence_length": length,
        "vocab_size": vocabulary,
        "embedding_size": config.vocab_size,
        "eos_token_id": eos,
        "pad_token_id": eos if config.pad_token_id is None else config.pad_token_id,
    }


def check_layout(config: PreTrainedConfig, where: str) -> None:
    """Raises UserError, which begins with `where`, for sizes that OLMo's YAML cannot say."""
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind != "default" or head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise UserError(
            f"{where}: its rotary embedding ({kind}) or head size ({head_dim(config)}) is none that OLMo has: this"
            " model has no native layout"
        )
