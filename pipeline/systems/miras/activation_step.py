"""A training step as the estimates of its memory know it, and whether its scans run on native kernels."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from pipeline.host.devices import Device
from pipeline.lm.config import AttentionConfig
from pipeline.lm.decoder_config import head_dim, kv_width
from pipeline.ops import scan_native
from pipeline.systems.miras.config import MemoryConfig, MirasConfig
from pipeline.systems.miras.layer_kinds import by_layer, on_backbone

LARGE_SHARED_MEMORY = ((8, 0), (9, 0), (10, 0), (10, 3))
"""Compute capabilities whose blocks have the shared memory that the native scan needs; the others have 99 KB, which
hold float32 heads of 32 alone (docs/kernels.md)."""


@dataclass(frozen=True)
class Step:
    """One micro-batch of a run, as a rank sees it."""

    sizes: MirasConfig
    backbone: PreTrainedConfig
    element: int
    """Bytes of a number that the model computes in."""
    rows: int
    sequence: int
    degree: int = 1
    """Ranks that share a sequence."""
    recompute: bool = False
    natively: bool = True
    """Whether the scan runs on the native kernels, where they take the memory."""
    device: Device | None = None
    """The device, whose kernels are asked for; None: `natively` alone decides."""
    float16: bool = False
    """Whether the model computes in float16, of which the kernels get copies in float32."""

    @property
    def tokens(self) -> int:
        """This rank's part of the micro-batch's tokens."""
        return self.rows * self.sequence // self.degree

    def runs_natively(self, memory: MemoryConfig) -> bool:
        """Whether the scan of a memory runs on the native kernels."""
        return self.natively and (
            self.device is None or runs_natively(memory, 4 if self.float16 else self.element, self.device)
        )

    @property
    def attention(self) -> AttentionConfig:
        return self.sizes.attention

    @property
    def trainable(self) -> bool:
        """Whether the backbone is trained."""
        return self.sizes.backbone.trainable

    @property
    def head_dim(self) -> int:
        """Of attention."""
        return head_dim(self.backbone)

    @property
    def kv_width(self) -> int:
        return kv_width(self.backbone)

    @property
    def kinds(self) -> dict[int, MemoryConfig]:
        """The memory of each layer that has one."""
        return by_layer(on_backbone(self.sizes, self.backbone).memory, self.backbone)


def runs_natively(memory: MemoryConfig, element: int, device: Device) -> bool:
    """Whether the scan runs on the native kernels there, where they are built, with numbers of `element` bytes."""
    if memory.backend == "torch" or memory.chunk_start is not None or memory.head_dim not in scan_native.KEY_DIMS:
        return False
    small = device.capability >= (8, 0) and element == 4 and memory.head_dim == 32
    return small or device.capability in LARGE_SHARED_MEMORY
