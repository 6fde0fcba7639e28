"""OLMo's own forward pass on the tensors of a model.pt, in plain float64, and small decoders to compare it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, Olmo2Config, OlmoConfig, PreTrainedConfig

COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def small_config(kind: str, *, tied: bool, kv_heads: int = 4, **sizes: int) -> PreTrainedConfig:
    """Of the `first` OLMo, which clips here, or of the `second`."""
    common = {**COMMON, "tie_word_embeddings": tied, "num_key_value_heads": kv_heads, **sizes}
    if kind == "first":
        return OlmoConfig(**common, clip_qkv=0.5, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    return Olmo2Config(**common, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})


def small_decoder(config: PreTrainedConfig, seed: int = 0) -> Any:
    """The decoder with random weights, norms too, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def native_logits(weights: Mapping[str, Tensor], section: Mapping[str, Any], ids: Tensor) -> Tensor:
    """What OLMo computes by its own rules of ids [rows, tokens]: logits [rows, tokens, embedding_size] float64."""
    weights = {name: value.double() for name, value in weights.items()}
    width, heads, groups = section["d_model"], section["n_heads"], section["n_kv_heads"]
    size = width // heads
    x = weights["transformer.wte.weight"][ids]
    for index in range(section["n_layers"]):
        block = {
            name.removeprefix(f"transformer.blocks.{index}.").removesuffix(".weight"): value
            for name, value in weights.items()
            if name.startswith(f"transformer.blocks.{index}.")
        }
        before = x if section["norm_after"] else _norm(x, None, section)
        qkv = before @ block["att_proj"].T
        if section["clip_qkv"] is not None:
            qkv = qkv.clamp(-section["clip_qkv"], section["clip_qkv"])
        q, k, v = qkv.split((width, groups * size, groups * size), dim=-1)
        if section["attention_layer_norm"]:
            q, k = _norm(q, block["q_norm"], section), _norm(k, block["k_norm"], section)
        q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in (q, k, v))
        q, k = _rotate(q, section["rope_theta"]), _rotate(k, section["rope_theta"])
        k, v = (part.repeat_interleave(heads // groups, dim=1) for part in (k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        attended = attended @ block["attn_out"].T
        x = x + (_norm(attended, block["attn_norm"], section) if section["norm_after"] else attended)
        before = x if section["norm_after"] else _norm(x, None, section)
        up, gate = (before @ block["ff_proj"].T).chunk(2, dim=-1)
        out = (functional.silu(gate) * up) @ block["ff_out"].T
        x = x + (_norm(out, block["ff_norm"], section) if section["norm_after"] else out)
    x = _norm(x, weights.get("transformer.ln_f.weight"), section)
    return x @ weights["transformer.wte.weight" if section["weight_tying"] else "transformer.ff_out.weight"].T


def _norm(x: Tensor, weight: Tensor | None, section: Mapping[str, Any]) -> Tensor:
    if section["layer_norm_type"] == "rms":
        x = x * (x.square().mean(-1, keepdim=True) + section["layer_norm_eps"]).rsqrt()
        return x if weight is None else x * weight
    return functional.layer_norm(x, x.shape[-1:], eps=section["layer_norm_eps"])


def _rotate(x: Tensor, theta: float) -> Tensor:
    size = x.shape[-1]
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * theta ** (
        -torch.arange(0, size, 2, dtype=torch.float64) / size
    )
    angles = torch.cat([angles, angles], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
