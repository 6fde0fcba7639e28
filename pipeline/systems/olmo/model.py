"""The model: a transformers decoder on sequence-parallel attention, with its loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from pipeline.lm.attention import AttentionCall, Beside, plan_attention
from pipeline.lm.backbone import UNROTATED, build_backbone, rope_of
from pipeline.lm.config import AttentionConfig
from pipeline.ops.attention import Rope
from pipeline.parallel.topology import Topology
from pipeline.systems.olmo.config import OlmoConfig


class ModelOutput(NamedTuple):
    """losses [batch, sequence / degree]: nats per label, 0 where ignored; predictions alike, int64, when asked for;
    z_losses like the losses, where they have a weight."""

    losses: Tensor
    predictions: Tensor | None
    z_losses: Tensor | None = None


class OlmoModel(nn.Module):
    """The decoder. Parameter names: `backbone.*` as in transformers."""

    def __init__(
        self,
        config: OlmoConfig,
        backbone: PreTrainedConfig,
        *,
        document_mask: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        """`document_mask`: documents in one sequence do not see each other, and positions restart with each; without,
        attention and positions run over the sequence."""
        super().__init__()
        self.document_mask, self.z_loss = document_mask, config.z_loss
        self.backbone = build_backbone(backbone)
        self.attention = AttentionConfig("full", backend=config.attention.backend)
        self.activation_checkpointing = activation_checkpointing
        self._rope: Rope | None = None

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        segment_ids: Tensor,
        positions: Tensor,
        topology: Topology,
        *,
        predict: bool = False,
    ) -> ModelOutput:
        """One forward pass over this rank's part of the sequences.

        input_ids and labels [batch, sequence / degree] (this rank's part), segment_ids and positions [batch, sequence]
        (whole).
        """
        hidden = self.backbone.model.embed_tokens(input_ids)
        if not self.document_mask:
            segment_ids, positions = _one_document(segment_ids)
        if self._rope is None:
            self._rope = rope_of(self.backbone)
        plan = plan_attention(self.attention, self.backbone.config, self._rope, segment_ids, positions, None, hidden)
        call, beside = AttentionCall(plan, topology, []), Beside()
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer in self.backbone.model.layers:

            def block(hidden: Tensor, layer: nn.Module = layer) -> Tensor:
                return layer(hidden, position_embeddings=UNROTATED, attention_call=call, beside=beside)

            hidden = checkpoint(block, hidden, use_reentrant=False) if recompute else block(hidden)
        hidden = self.backbone.model.norm(hidden)
        return ModelOutput(*self.backbone.lm_head(hidden, labels, predict, z_loss=self.z_loss or None))


def _one_document(segment_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Segment ids and positions [batch, sequence] of a sequence that is taken for one document."""
    positions = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    return torch.zeros_like(segment_ids), positions
