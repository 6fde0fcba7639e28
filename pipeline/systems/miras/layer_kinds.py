"""The memories of a model by layer and kind, once the backbone is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedConfig

from pipeline.errors import UserError
from pipeline.lm.decoder_config import head_dim
from pipeline.systems.miras.config import LIKE_ATTENTION, MemoryConfig, MirasConfig
from pipeline.systems.miras.layer_choice import LAYERS, OVERFLOW, chosen_layers, shown_layers


def on_backbone(config: MirasConfig, backbone: PreTrainedConfig) -> MirasConfig:
    """The config with all layers by number, and the memories of `overflow` as the backbone's attention has its heads.

    Raises UserError when the backbone has fewer layers, or a layer of overflow-layers is none of the chosen.
    """
    memory, count = config.memory, backbone.num_hidden_layers
    layers, overflow = chosen_layers(memory.layers, count), chosen_layers(memory.overflow_layers, count, OVERFLOW)
    strange = [layer for layer in overflow if layer not in layers]
    if strange:
        raise UserError(
            f"{OVERFLOW} {shown_layers(memory.overflow_layers)}: layer {strange[0]} is none of {LAYERS}: add it"
        )
    memory = dataclasses.replace(memory, layers=layers, overflow_layers=overflow)
    if memory.attachment == "overflow":
        memory = dataclasses.replace(memory, overflow_layers=())
    if memory.attachment in LIKE_ATTENTION:
        memory = _like_attention(memory, backbone)
    return dataclasses.replace(config, memory=memory)


def kinds_of_memory(memory: MemoryConfig, backbone: PreTrainedConfig) -> list[MemoryConfig]:
    """A section for each attachment in use, of a config `on_backbone`: its own layers and heads."""
    overflow = tuple(layer for layer in layer_numbers(memory) if layer in memory.overflow_layers)
    others = tuple(layer for layer in layer_numbers(memory) if layer not in overflow)
    kinds = [dataclasses.replace(memory, layers=others, overflow_layers=())]
    if overflow:
        changed = dataclasses.replace(memory, layers=overflow, overflow_layers=(), attachment="overflow")
        kinds.append(_like_attention(changed, backbone))
    return [kind for kind in kinds if kind.layers]


def by_layer(memory: MemoryConfig, backbone: PreTrainedConfig) -> dict[int, MemoryConfig]:
    """The section of each layer that has a memory, in the order of the layers."""
    found = {layer: kind for kind in kinds_of_memory(memory, backbone) for layer in layer_numbers(kind)}
    return dict(sorted(found.items()))


def layer_numbers(memory: MemoryConfig) -> tuple[int, ...]:
    """The layers of a config `on_backbone`, which are numbers."""
    numbers = tuple(layer for layer in memory.layers if isinstance(layer, int))
    assert len(numbers) == len(memory.layers), "the config has not been put on a backbone"
    return numbers


def _like_attention(memory: MemoryConfig, backbone: PreTrainedConfig) -> MemoryConfig:
    return dataclasses.replace(memory, heads=backbone.num_attention_heads, head_dim=head_dim(backbone))


def check_chunks(kinds: Sequence[MemoryConfig], sequence_length: int) -> None:
    """Raises UserError where a memory of chunks is written and never read within a sequence, or where chunks of slots
    do not go on from one step to the next."""
    for kind in kinds:
        if kind.attachment == "slots":
            if kind.layers and sequence_length % kind.slots.chunk:
                raise UserError(
                    f"--model.memory.slots.chunk {kind.slots.chunk} does not divide the --sequence-length"
                    f" {sequence_length}: chunks go on from step to step: give a divisor"
                )
            continue
        chunk = kind.swiglu.gradient_chunk
        # A segment of mac is a chunk at the longest.
        if kind.layers and kind.rule == "swiglu" and kind.attachment != "mac" and chunk >= sequence_length:
            raise UserError(
                f"--model.memory.swiglu.gradient-chunk {chunk}: a chunk reads what those before it wrote, and the"
                f" --sequence-length {sequence_length} holds no two of them: lower it"
            )
