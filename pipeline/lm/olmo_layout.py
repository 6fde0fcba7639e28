"""Names and shapes of weights in OLMo's own checkpoints, beside those of transformers.

OLMo fuses the projections of queries, keys and values, in this order, and those of the feed-forward layer: the rows of
`ff_proj` are those of transformers' `up_proj`, then those of `gate_proj`. What is elementwise, such as an optimizer's
moments, is fused alike.
Source: github.com/allenai/OLMo, olmo/model.py and scripts/convert_olmo_to_hf_new.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import Olmo2Config, OlmoConfig, PreTrainedConfig

from pipeline.errors import UserError, shown
from pipeline.lm.decoder_config import attention_width, kv_width

Parts = Mapping[str, int]
"""Tensors of transformers by name, in the order in which OLMo joins them, with their rows."""


def has_layout(config: PreTrainedConfig) -> bool:
    """Whether OLMo's checkpoints can hold a decoder of this kind."""
    return isinstance(config, (OlmoConfig, Olmo2Config)) and not config.attention_bias


def layout(config: PreTrainedConfig) -> dict[str, Parts]:
    """What each of OLMo's tensors is made of."""
    assert has_layout(config)
    width, vocabulary, ffn = config.hidden_size, config.vocab_size, config.intermediate_size
    queries, keys = attention_width(config), kv_width(config)
    normed = isinstance(config, Olmo2Config)
    found: dict[str, Parts] = {"transformer.wte.weight": {"model.embed_tokens.weight": vocabulary}}
    for index in range(config.num_hidden_layers):
        block, layer = f"transformer.blocks.{index}", f"model.layers.{index}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        found[f"{block}.att_proj.weight"] = {
            f"{attention}.q_proj.weight": queries,
            f"{attention}.k_proj.weight": keys,
            f"{attention}.v_proj.weight": keys,
        }
        found[f"{block}.attn_out.weight"] = {f"{attention}.o_proj.weight": width}
        found[f"{block}.ff_proj.weight"] = {f"{mlp}.up_proj.weight": ffn, f"{mlp}.gate_proj.weight": ffn}
        found[f"{block}.ff_out.weight"] = {f"{mlp}.down_proj.weight": width}
        if normed:
            found[f"{block}.q_norm.weight"] = {f"{attention}.q_norm.weight": queries}
            found[f"{block}.k_norm.weight"] = {f"{attention}.k_norm.weight": keys}
            found[f"{block}.attn_norm.weight"] = {f"{layer}.post_attention_layernorm.weight": width}
            found[f"{block}.ff_norm.weight"] = {f"{layer}.post_feedforward_layernorm.weight": width}
    if normed:
        found["transformer.ln_f.weight"] = {"model.norm.weight": width}
    if not config.tie_word_embeddings:
        found["transformer.ff_out.weight"] = {"lm_head.weight": vocabulary}
    return found


def fused(tensors: Mapping[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """Tensors by transformers' names [rows, ...], as OLMo names and joins them."""
    return {name: join(tensors, parts) for name, parts in layout(config).items()}


def join(tensors: Mapping[str, Tensor], parts: Parts) -> Tensor:
    """The tensors of these parts [rows, ...] as one."""
    pieces = [tensors[part] for part in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def split(
    tensors: Mapping[str, Tensor], config: PreTrainedConfig, where: str, *, partial: bool = False
) -> dict[str, Tensor]:
    """Tensors by OLMo's names, as transformers names and splits them. Raises UserError, which begins with `where`, for
    a tensor of another shape, one that the decoder has not and, unless they may be `partial`, one that is missing."""
    wanted = layout(config)
    unknown = next((name for name in tensors if name not in wanted), None)
    if unknown is not None:
        raise UserError(f"{where}: {shown(unknown)} is no tensor of the model that its config.yaml describes: {_OTHER}")
    missing = next((name for name in wanted if name not in tensors), None)
    if missing is not None and not partial:
        raise UserError(f"{where}: lacks {missing!r}, which the model of its config.yaml has: {_OTHER}")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = wanted[name]
        shape = (sum(parts.values()), *_columns(name, config))
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{where}: {name!r} is {tuple(tensor.shape)}, and {shape} in the model of its config.yaml: {_OTHER}"
            )
        # Copies: torch.save writes all of the memory that a view belongs to.
        pieces = [piece.clone() for piece in tensor.split(list(parts.values()))] if len(parts) > 1 else [tensor]
        found |= dict(zip(parts, pieces, strict=True))
    return found


_OTHER = "take a checkpoint whose files belong together"


def _columns(name: str, config: PreTrainedConfig) -> tuple[int, ...]:
    """The columns of one of OLMo's matrices; none of a vector."""
    if "norm" in name or "ln_f" in name:
        return ()
    if name.endswith("attn_out.weight"):
        return (attention_width(config),)
    if name.endswith("ff_out.weight") and "blocks" in name:
        return (config.intermediate_size,)
    return (config.hidden_size,)
