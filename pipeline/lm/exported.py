"""A decoder of this project as the plain class of transformers: same parameters, transformers' own attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel


def plain_decoder(backbone: nn.Module, *, trained_length: int, keep_length: bool) -> PreTrainedModel:
    """The decoder that `build_backbone` made as a `...ForCausalLM` that shares its parameters, in evaluation mode.

    `trained_length`: tokens of a training sequence, which the config says as `max_position_embeddings`; with
    `keep_length` no less than it says already. Rotary frequencies that depend on that field leave it as it is.
    """
    own: Any = backbone.config
    # By way of its dictionary, which does not say which attention ran here.
    config: PreTrainedConfig = type(own).from_dict(own.to_dict())
    config.max_position_embeddings = _length(own, trained_length, keep_length)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    state = backbone.state_dict()
    dtype = next(iter(state.values())).dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    if config.tie_word_embeddings:
        # One parameter, which the state has once.
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # Its frequencies are no parameter, and are on the meta device until now.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(next(model.parameters()).device)
    model.config.dtype = dtype
    return model.eval()


def _length(config: PreTrainedConfig, trained: int, keep: bool) -> int:
    own = int(config.max_position_embeddings)
    if (config.rope_parameters or {}).get("rope_type", "default") != "default":
        return own
    return max(own, trained) if keep else trained
