"""How a memory meets its layer: beside it, before it, as a gate of its attention, or inside of its attention.

`residual`, `mal` and `mag` (Titans, arXiv 2501.00663, section 4.2 and 4.3) use the memory branch as it is, and differ
in where its output goes; see `model.py`. `mac` is in `context_memory.py`, `overflow` in `overflow.py`.
docs/attachments.md has the equations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pipeline.errors import UserError
from pipeline.lm.config import AttentionConfig
from pipeline.lm.decoder_config import attention_width
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import is_sharded
from pipeline.systems.miras.config import MemoryConfig


def check_attachment(
    config: MemoryConfig, backbone: PreTrainedConfig, attention: AttentionConfig | None = None
) -> None:
    """Raises UserError when the memory cannot be attached to this backbone in the way that the config asks for."""
    if config.attachment == "overflow" and config.layers and attention is not None and attention.kind == "full":
        raise UserError(
            "--model.memory.attachment overflow: with --model.attention.kind full nothing leaves a window: give window,"
            " or another attachment"
        )
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


def check_gathering(model: nn.Module, config: MemoryConfig, topology: Topology) -> None:
    """Raises UserError where ranks would wait for each other in vain.

    ZeRO-3 gathers a rule's own parameters whenever the rule is used: once per stage of `mac`, of which data ranks with
    other documents have another number.
    """
    own = [p for name, p in model.named_parameters() if ".rule." in name and is_sharded(p)]
    if config.attachment == "mac" and topology.data > 1 and own:
        raise UserError(
            f"--model.memory.attachment mac with --model.memory.rule {config.rule}: ZeRO-3 would gather its weights at"
            " other moments on every data rank: give --zero zero2, or one data rank (--parallel.sequence)"
        )


def output_gate(logits: Tensor) -> Tensor:
    """The gate that is one where its logits are zero: 2 sigmoid(logits)."""
    return 2 * torch.sigmoid(logits)
