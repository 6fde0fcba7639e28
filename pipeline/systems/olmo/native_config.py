"""The `model` section of OLMo's own configuration files (github.com/allenai/OLMo, olmo/config.py), read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError, shown
from pipeline.lm.config import BackboneConfig
from pipeline.systems.olmo.config import OlmoConfig

DEFAULTS: Mapping[str, Any] = {
    "d_model": 768, "n_heads": 12, "n_kv_heads": None, "n_layers": 12, "mlp_ratio": 4, "mlp_hidden_size": None,
    "weight_tying": True, "clip_qkv": None, "rope_theta": 10_000, "layer_norm_type": "default",
    "layer_norm_with_affine": True, "layer_norm_eps": 1e-5, "attention_layer_norm": False, "norm_after": False,
    "vocab_size": 50257, "embedding_size": 50304, "init_fn": "normal", "init_std": 0.02, "init_cutoff_factor": None,
    "max_sequence_length": 1024,
}  # fmt: skip
"""OLMo's own, of the fields that are read here."""
FIXED: Mapping[str, tuple[Any, ...]] = {
    "activation_type": ("swiglu",),
    "alibi": (False,),
    "rope": (True,),
    "block_type": ("sequential", "llama"),
    "include_bias": (False,),
    "bias_for_layer_norm": (False, None),
    "multi_query_attention": (False, None),
    "scale_logits": (False,),
    "scale_emb_init": (False,),
    "emb_init_std": (None,),
    "attention_dropout": (0.0,),
    "residual_dropout": (0.0,),
    "embedding_dropout": (0.0,),
}
"""Fields with the values that are supported, where a file gives them."""
NO_EFFECT = (
    "flash_attention", "init_device", "precision", "eos_token_id", "pad_token_id", "rope_full_precision",
    "attention_layer_norm_with_affine", "block_group_size", "alibi_bias_max",
)  # fmt: skip
"""Fields that change nothing in what such a model computes here."""


def read_model(section: Mapping[str, Any], where: str) -> OlmoConfig:
    """The model that a section describes, of the type olmo (LayerNorm without weights) or olmo2 (RMSNorm on what a
    branch gives). Raises UserError, which begins with `where`, for one that is neither or has other parts."""
    for key, supported in FIXED.items():
        if section.get(key, supported[0]) not in supported:
            raise UserError(f"{where}: model.{key} is {shown(section[key])}: only {_listed(supported)} is supported")
    values = {key: section.get(key, default) for key, default in DEFAULTS.items()}
    new = _is_olmo2(values, where)
    if values["clip_qkv"] is not None and new:
        raise UserError(f"{where}: model.clip_qkv is {shown(values['clip_qkv'])}: olmo2 has no clipping: leave it out")
    width, heads = _whole(values, "d_model", where), _whole(values, "n_heads", where)
    inner = _whole(values, "mlp_hidden_size" if values["mlp_hidden_size"] is not None else "mlp_ratio", where)
    fused = inner if values["mlp_hidden_size"] is not None else inner * width
    # None: the vocabulary has as many rows as ids.
    rows = "embedding_size" if values["embedding_size"] is not None else "vocab_size"
    initialisation = str(values["init_fn"])
    if initialisation not in ("mitchell", "normal"):
        raise UserError(f"{where}: model.init_fn is {shown(values['init_fn'])}: only mitchell and normal are supported")
    return OlmoConfig(
        backbone=BackboneConfig(
            trainable=True,
            model_type="olmo2" if new else "olmo",
            tied=bool(values["weight_tying"]),
            clip_qkv=None if values["clip_qkv"] is None else number(values["clip_qkv"], f"{where}: model.clip_qkv"),
            layers=_whole(values, "n_layers", where),
            width=width,
            heads=heads,
            kv_heads=heads if values["n_kv_heads"] is None else _whole(values, "n_kv_heads", where),
            # Of the fused projection: SwiGLU multiplies its halves.
            ffn=fused // 2,
            vocabulary=_whole(values, rows, where),
            rope_theta=number(values["rope_theta"], f"{where}: model.rope_theta"),
            norm_eps=number(values["layer_norm_eps"], f"{where}: model.layer_norm_eps"),
            initializer_range=number(values["init_std"], f"{where}: model.init_std"),
        ),
        initialisation="mitchell" if initialisation == "mitchell" else "normal",
    )


def sequence_length(section: Mapping[str, Any], where: str) -> int:
    """Tokens of a sequence that a section's model is trained on."""
    return _whole({**DEFAULTS, **section}, "max_sequence_length", where)


def number(value: Any, what: str) -> float:
    """A number of a YAML file, to which 1e-6 is text. Raises UserError, which begins with `what`."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{what} is {shown(value)}: give a number") from None


def _whole(values: Mapping[str, Any], key: str, where: str) -> int:
    found = number(values[key], f"{where}: model.{key}")
    if found != int(found):
        raise UserError(f"{where}: model.{key} is {shown(values[key])}: give a whole number")
    return int(found)


def _is_olmo2(values: Mapping[str, Any], where: str) -> bool:
    """Whether the norms are those of OLMo 2. Raises UserError where they are of no model that is supported."""
    given = tuple(
        values[key] for key in ("layer_norm_type", "layer_norm_with_affine", "attention_layer_norm", "norm_after")
    )
    if given in (("default", False, False, False), ("low_precision", False, False, False)):
        if number(values["layer_norm_eps"], f"{where}: model.layer_norm_eps") != 1e-5:
            raise UserError(f"{where}: model.layer_norm_eps is {shown(values['layer_norm_eps'])}: olmo has 1e-5")
        return False
    if given == ("rms", True, True, True):
        return True
    raise UserError(
        f"{where}: model.layer_norm_type {shown(given[0])} with layer_norm_with_affine {given[1]}, attention_layer_norm"
        f" {given[2]} and norm_after {given[3]} is neither OLMo (default, false, false, false) nor OLMo 2 (rms, true,"
        " true, true)"
    )


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(str(value).lower() for value in values if value is not None)
