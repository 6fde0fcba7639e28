"""The `model` section of OLMo's own configuration files as an `OlmoConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.durations import number
from pipeline.errors import UserError, shown
from pipeline.lm.config import BackboneConfig
from pipeline.lm.decoder_config import kv_heads, norm_eps
from pipeline.lm.olmo_config import DEFAULTS, DROPOUTS, decoder_of
from pipeline.systems.olmo.config import OlmoConfig

NUMBERS = ("rope_theta", "layer_norm_eps", "clip_qkv", "init_std")
"""Fields that YAML 1.1 may have read as text, such as 1e-6."""
READ = {*DEFAULTS, "init_fn", "init_std", "init_cutoff_factor"}
"""Fields that decide the model or its first weights."""
NO_EFFECT = {"flash_attention", "init_device", "precision", "rope_full_precision", "block_group_size", "alibi_bias_max"}
"""Fields that change nothing in what such a model computes here."""


def read_model(section: Mapping[str, Any], where: str) -> OlmoConfig:
    """The model that a section describes, for training. Raises UserError, which begins with `where`, for one that is
    neither OLMo nor OLMo 2, or has other parts."""
    converted = {
        key: number(value, f"{where}: model: {key}") if key in NUMBERS and value is not None else value
        for key, value in section.items()
    }
    for key in DROPOUTS:
        value = number(section.get(key, DEFAULTS[key]), f"{where}: model: {key}")
        if value:
            raise UserError(f"{where}: model: {key} is {value:g}, and here there is no dropout: give 0")
    initialisation = section.get("init_fn", "normal")
    if initialisation not in ("mitchell", "normal"):
        raise UserError(f"{where}: model: init_fn is {shown(initialisation)}: only mitchell and normal are supported")
    found = decoder_of(converted, where)
    return OlmoConfig(
        backbone=BackboneConfig(
            trainable=True,
            model_type="olmo2" if found.model_type == "olmo2" else "olmo",
            tied=bool(found.tie_word_embeddings),
            clip_qkv=getattr(found, "clip_qkv", None),
            layers=found.num_hidden_layers,
            width=found.hidden_size,
            heads=found.num_attention_heads,
            kv_heads=kv_heads(found),
            ffn=found.intermediate_size,
            vocabulary=found.vocab_size,
            rope_theta=float((found.rope_parameters or {})["rope_theta"]),
            norm_eps=norm_eps(found),
            initializer_range=converted.get("init_std", 0.02),
        ),
        initialisation="mitchell" if initialisation == "mitchell" else "normal",
    )
