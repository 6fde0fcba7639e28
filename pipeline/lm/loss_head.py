"""The output embedding of a language model, fused with its loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pipeline.ops.cross_entropy import linear_argmax, linear_cross_entropy, linear_cross_entropy_z
from pipeline.ops.distillation import linear_kl


class LossHead(nn.Linear):
    """The output embedding, which turns hidden states into losses with a tile of logits at a time."""

    def tie(self, embedding: nn.Embedding) -> None:
        """Takes the embedding's weight for its own: one parameter, which the model's state holds as the embedding's."""
        self.weight = embedding.weight
        self.register_state_dict_post_hook(_without_weight)

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        predict: bool = False,
        *,
        teacher: Tensor | None = None,
        z_loss: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
        """Losses in nats of hidden [batch, sequence, width] and labels [batch, sequence], 0 where ignored, and
        predictions alike, int64, when `predict` asks for them; without labels the logits, as transformers has them.

        With the weight of a z-loss, above 0: the z-loss of every label too [batch, sequence].

        With a teacher's hidden states [tokens, width], of hidden alike: KL(teacher || student) in nats [tokens]. Raises
        ValueError for it where the head has a bias.
        """
        # Here, not in a method of its own: ZeRO-3 gathers the weight for a call of the module.
        if teacher is not None:
            if self.bias is not None:
                raise ValueError("the divergence from a teacher takes a head without bias")
            return linear_kl(hidden, teacher, self.weight)
        if labels is None:
            return super().forward(hidden)
        flat, penalties = hidden.flatten(0, 1), None
        if z_loss is None:
            losses = linear_cross_entropy(flat, self.weight, labels.flatten(), bias=self.bias)
        else:
            losses, penalties = linear_cross_entropy_z(flat, self.weight, labels.flatten(), z_loss, bias=self.bias)
        predictions = linear_argmax(flat, self.weight, self.bias).view_as(labels) if predict else None
        found = losses.view_as(labels), predictions
        return found if penalties is None else (*found, penalties.view_as(labels))


def _without_weight(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    del state[f"{prefix}weight"]
