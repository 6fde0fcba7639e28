"""Which model it is: a hash of its weights and of what it computes with them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from pipeline.config import MAY_CHANGE
from pipeline.config_file import to_plain
from pipeline.inference.system_model import SystemModel

ELSEWHERE = (
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "transformers_version", "use_cache",
)  # fmt: skip
"""What a config of transformers says that changes no logit."""
FROM = ("pretrained", "revision")
"""Fields that say where weights came from; the weights count by themselves."""


def model_hash(model: nn.Module) -> str:
    """Equal for models that compute the same: names, shapes, kinds and values of the weights and of persistent buffers,
    and the config. Where its files lie does not count, nor the device. 32 hex digits (xxh128)."""
    state = xxhash.xxh3_128(json.dumps(config_of(model), sort_keys=True, default=str).encode())
    for name, tensor in sorted(_tensors(model)):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def config_of(model: nn.Module) -> dict[str, Any]:
    """What a model computes, as plain values: the config of transformers, or the model's section of the run."""
    if not isinstance(model, SystemModel):
        return _of_transformers(model.config)
    section, backbone = model.system.config.model, getattr(model.system, "backbone", None)
    found = {"model": _decisive(section, to_plain(section))}
    return found if backbone is None else {**found, "backbone": _of_transformers(backbone)}


def _of_transformers(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in ELSEWHERE}


def _decisive(section: Any, plain: dict[str, Any]) -> dict[str, Any]:
    """The fields that make it another model; as a resume compares them."""
    ignored = {*FROM, *getattr(section, "ignored_fields", ())}
    found = {}
    for field in dataclasses.fields(section):
        if field.name in ignored or MAY_CHANGE.items() <= field.metadata.items():
            continue
        value, name = getattr(section, field.name), field.name
        found[name] = _decisive(value, plain[name]) if dataclasses.is_dataclass(value) else plain[name]
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each once, under its first name."""
    kept = model.state_dict().keys()
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)
