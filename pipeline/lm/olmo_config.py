"""The `model` section of an OLMo config.yaml, and the transformers config of the same decoder.

Source: github.com/allenai/OLMo, olmo/config.py (ModelConfig, its defaults) and olmo/model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Olmo2Config, OlmoConfig, PreTrainedConfig

from pipeline.errors import UserError, shown
from pipeline.lm.decoder_config import NORM_EPS, head_dim, kv_heads
from pipeline.units import LARGEST

DEFAULTS: Mapping[str, Any] = {
    "d_model": 768, "n_heads": 12, "n_kv_heads": None, "n_layers": 12, "mlp_ratio": 4, "mlp_hidden_size": None,
    "activation_type": "swiglu", "block_type": "sequential", "alibi": False, "rope": False, "rope_theta": 10_000,
    "multi_query_attention": False, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "clip_qkv": None, "layer_norm_type": "default", "layer_norm_with_affine": True, "layer_norm_eps": NORM_EPS,
    "norm_after": False, "max_sequence_length": 1024, "include_bias": True, "bias_for_layer_norm": None,
    "scale_logits": False, "vocab_size": 50257, "embedding_size": 50304, "weight_tying": True, "eos_token_id": 50256,
    "pad_token_id": 50256, "attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1,
}  # fmt: skip
"""OLMo's defaults of what decides the decoder."""
BOTH: Mapping[str, Any] = {
    "block_type": "sequential", "activation_type": "swiglu", "rope": True, "alibi": False, "scale_logits": False,
    "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0,
}  # fmt: skip
FIRST: Mapping[str, Any] = {"layer_norm_type": "default", "attention_layer_norm": False, "norm_after": False}
SECOND: Mapping[str, Any] = {"layer_norm_type": "rms", "attention_layer_norm": True, "norm_after": True}
"""Fields in which the decoders differ that transformers has as OlmoForCausalLM and Olmo2ForCausalLM."""
SIZES = ("d_model", "n_heads", "n_layers", "max_sequence_length", "vocab_size")
DROPOUTS = ("attention_dropout", "residual_dropout", "embedding_dropout")


def decoder_of(model: Any, where: str) -> PreTrainedConfig:
    """The transformers config of a `model` section. Raises UserError, which begins with `where`, for one that is no
    such section, or of a decoder that neither OlmoForCausalLM nor Olmo2ForCausalLM computes.

    Dropout is not compared: it changes the training and not the model.
    """
    if not isinstance(model, dict):
        raise UserError(f"{where}: has no `model` section: give the config.yaml of an OLMo checkpoint")
    section = {**DEFAULTS, **model}
    second = section["layer_norm_type"] == "rms"
    wanted = {**BOTH, **(SECOND if second else FIRST), "layer_norm_with_affine": second}
    if second:
        wanted["attention_layer_norm_with_affine"] = True
    for key, value in wanted.items():
        if key not in DROPOUTS and section[key] != value:
            raise _refused(where, key, section[key], f"a {'second' if second else 'first'} OLMo has {shown(value)}")
    for key in ("include_bias", "bias_for_layer_norm"):
        # Biases of norms are those of all layers where they have no field of their own.
        if section["include_bias"] if section[key] is None else section[key]:
            raise _refused(where, key, section[key], "its biases have no place in transformers' decoder")
    if not second and section["layer_norm_eps"] != NORM_EPS:
        raise _refused(where, "layer_norm_eps", section["layer_norm_eps"], f"transformers' decoder has {NORM_EPS}")
    sizes = {key: _whole(where, key, section[key]) for key in SIZES}
    width, heads = sizes["d_model"], sizes["n_heads"]
    if width % heads:
        raise UserError(f"{where}: model: d_model {width} is not divisible by n_heads {heads}: correct it")
    if section["n_kv_heads"] is not None:
        groups = _whole(where, "n_kv_heads", section["n_kv_heads"])
    else:
        groups = 1 if section["multi_query_attention"] else heads
    if section["mlp_hidden_size"] is not None:
        fused = _whole(where, "mlp_hidden_size", section["mlp_hidden_size"])
    else:
        fused = width * _whole(where, "mlp_ratio", section["mlp_ratio"])
    rows = sizes["vocab_size"]
    if section["embedding_size"] is not None:
        rows = max(rows, _whole(where, "embedding_size", section["embedding_size"]))
    common: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": width,
        # Half of the fused projection is the gate.
        "intermediate_size": fused // 2,
        "num_hidden_layers": sizes["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": sizes["max_sequence_length"],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(section["rope_theta"])},
        "tie_word_embeddings": bool(section["weight_tying"]),
        "bos_token_id": None,
        "eos_token_id": _id(section["eos_token_id"], rows),
        "pad_token_id": _id(section["pad_token_id"], rows),
    }
    if second:
        if section["clip_qkv"] is not None:
            raise _refused(where, "clip_qkv", section["clip_qkv"], "a second OLMo does not clip")
        return Olmo2Config(**common, rms_norm_eps=float(section["layer_norm_eps"]))
    return OlmoConfig(**common, clip_qkv=section["clip_qkv"])


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
        "rope_theta": rope.get("rope_theta", DEFAULTS["rope_theta"]),
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


def _whole(where: str, key: str, value: Any) -> int:
    # YAML 1.1 reads 1e3 as a text and 1.0e+3 as a float.
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        raise UserError(f"{where}: model: {key} is {shown(value)}: give a whole number from 1 on")
    return value


def _id(value: Any, rows: int) -> int | None:
    """A token id of the model; None for one that it does not have."""
    return value if isinstance(value, int) and 0 <= value < rows else None


def _refused(where: str, key: str, value: Any, why: str) -> UserError:
    return UserError(
        f"{where}: model: {key} is {shown(value)}, and {why}: give a checkpoint of the OLMo or OLMo 2 architecture"
    )
