"""How a memory meets its layer: beside it, before it, as a gate of its attention, or inside of its attention.

`residual`, `mal` and `mag` (Titans, arXiv 2501.00663, section 4.2 and 4.3) use the memory branch as it is, and differ
in where its output goes; see `model.py`. `mac` is in `context_memory.py`, `overflow` in `overflow.py`,
`slots` in `slots.py`.
docs/attachments.md has the equations.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pipeline.errors import UserError
from pipeline.lm.config import AttentionConfig
from pipeline.lm.decoder_config import attention_width
from pipeline.systems.miras.config import LIKE_ATTENTION, MemoryConfig
from pipeline.systems.miras.rules import memory_backend
from pipeline.systems.miras.slots import slots_backend


def attachment_backend(config: MemoryConfig, attention: str, device_type: str, dtype: torch.dtype) -> str:
    """A memory's backend by name: of its scan, or of attention to its slots, where `attention` is that of the other
    layers. Raises UserError when the scan's that was asked for cannot do it."""
    if config.attachment == "slots":
        return slots_backend(config, attention, torch.device(device_type), dtype)
    return memory_backend(config, device_type, dtype)


def check_attachment(
    config: MemoryConfig,
    backbone: PreTrainedConfig,
    attention: AttentionConfig | None = None,
    trained: int | None = None,
) -> None:
    """Raises UserError when the memory cannot be attached to this backbone, `trained` for so many positions where
    that is known, in the way that the config asks for."""
    if config.attachment in LIKE_ATTENTION and config.layers and attention is not None and attention.kind == "full":
        raise UserError(
            f"--model.memory.attachment {config.attachment}: with --model.attention.kind full nothing leaves a window:"
            " give window, or another attachment"
        )
    if config.attachment == "slots" and config.layers and attention is not None:
        chunk, window = config.slots.chunk, attention.window
        if chunk > window:
            raise UserError(
                f"--model.memory.slots.chunk {chunk}: what a chunk pushes out of the window is the window's, which is"
                f" {window} tokens: give no more"
            )
        if trained is not None:
            _check_reach(config, window, trained)
    width = attention_width(backbone)
    if config.attachment == "mag" and config.layers and width != backbone.hidden_size:
        raise UserError(
            f"--model.memory.attachment mag: the memory, {backbone.hidden_size} wide, cannot gate the attention of this"
            f" backbone, {width} wide: give another --model.memory.attachment"
        )
    if config.attachment != "mac" or not config.layers:
        return
    if config.heads != backbone.num_attention_heads:
        raise UserError(
            f"--model.memory.heads {config.heads}: mac writes what each of the {backbone.num_attention_heads} attention"
            f" heads gave into a memory of its own: give {backbone.num_attention_heads}, or another"
            " --model.memory.attachment"
        )


def _check_reach(config: MemoryConfig, window: int, trained: int) -> None:
    most = trained - window - config.slots.chunk
    if config.slots.reach > most:
        raise UserError(
            f"--model.memory.slots.reach {config.slots.reach}: beyond the window of {window} and a chunk of"
            f" {config.slots.chunk} it is further than the {trained} positions of the backbone: "
            + (f"give at most {most}" if most > 0 else "give a shorter --model.attention.window")
        )


def output_gate(logits: Tensor) -> Tensor:
    """The gate that is one where its logits are zero: 2 sigmoid(logits)."""
    return 2 * torch.sigmoid(logits)
