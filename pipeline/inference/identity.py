"""Which model it is: a hash of its weights and of what it computes with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

ELSEWHERE = (
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "transformers_version", "use_cache",
)  # fmt: skip
"""What a config of transformers says that changes no logit."""


def model_hash(model: nn.Module) -> str:
    """Equal for models that compute the same: names, shapes, kinds and values of the weights and of persistent buffers,
    and the config. Where its files lie does not count, nor the device. 32 hex digits (xxh128)."""
    state = xxhash.xxh3_128(json.dumps(config_of(model), sort_keys=True, default=str).encode())
    for name, tensor in sorted(_tensors(model)):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def config_of(model: nn.Module) -> dict[str, Any]:
    """What a model of transformers computes, as plain values."""
    config: Any = model.config
    # A config may know of more that changes nothing.
    found = getattr(config, "decisive", config.to_dict)()
    return {key: value for key, value in found.items() if key not in ELSEWHERE}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each once, under its first name."""
    kept = model.state_dict().keys()
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)
